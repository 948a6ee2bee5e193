"""What a run is besides its weights and moments: counters, positions, random generators, identity.

Everything is plain JSON: nothing that is read back can run code.
"""

import hashlib
import json
import random
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gearshift.engine.cluster import distributed
from gearshift.engine.ppo import PPOTrainer
from gearshift.engine.zero import state as zero_state


def trained(trainer: PPOTrainer) -> dict[str, Any]:
    """The roles that have an optimizer, by name."""
    roles = {"actor": trainer.actor, "critic": trainer.critic}
    return {name: role for name, role in roles.items() if role is not None}


def collect(trainer: PPOTrainer, stateful: Mapping[str, Any]) -> dict[str, Any]:
    """State that is the same on every rank. A collective.

    stateful: whatever else has a state_dict of plain values: the data streams.
    """
    roles = {
        name: zero_state.counters(role.engine, role.schedule)
        | {"shapes": zero_state.shapes(role.engine)}
        for name, role in trained(trainer).items()
    }
    return {
        "steps_done": trainer.steps_done,
        "kl_coef": trainer.kl.coef,
        "world_size": distributed.world_size(),
        "roles": roles,
        "stateful": {name: part.state_dict() for name, part in stateful.items()},
    }


def restore(state: Mapping[str, Any], trainer: PPOTrainer, stateful: Mapping[str, Any]) -> None:
    """The inverse of `collect`, without the engines."""
    trainer.steps_done = state["steps_done"]
    trainer.kl.coef = state["kl_coef"]
    for name, part in stateful.items():
        part.load_state_dict(state["stateful"][name])


def check_roles(state: Mapping[str, Any], trainer: PPOTrainer) -> None:
    """Raises ValueError where a trained model was not saved, or is not the one that was."""
    for name, role in trained(trainer).items():
        if name not in state["roles"]:
            raise ValueError(f"has no {name}; it was saved with another ppo.estimator")
        saved, here = state["roles"][name]["shapes"], zero_state.shapes(role.engine)
        for parameter in sorted(saved.keys() | here.keys()):
            theirs, ours = saved.get(parameter), here.get(parameter)
            if theirs != ours:
                raise ValueError(
                    f"is of another {name}: {parameter} is {_shape(theirs)} there and "
                    f"{_shape(ours)} in {name}.path; give the model it was saved with"
                )


def random_state() -> dict[str, Any]:
    """Every generator of this rank: Python's, NumPy's, torch's and the device's."""
    generator: Any = np.random.get_state()
    kind, keys, *rest = generator
    found = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        found["cuda"] = _text(torch.cuda.get_rng_state())
    return found


def restore_random(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def tokenizer_print(tokenizer: Any) -> str:
    """A fingerprint of what each token id means, special tokens and chat template included."""
    meaning = [
        sorted(tokenizer.get_vocab().items()),
        [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id],
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else str(shape)


def _text(state: torch.Tensor) -> str:
    return b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(b64decode(text)), dtype=torch.uint8)
