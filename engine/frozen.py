"""Reference and RewardModel: the roles that only score.

Where their DeepSpeed JSON offloads parameters they are streamed (streaming/engine.py); else they
are ordinary ZeRO engines without an optimizer.
"""

from dataclasses import replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from gearshift.engine.batch import Rollout
from gearshift.engine.config.deepspeed import offloaded
from gearshift.engine.config.schema import PPOConfig
from gearshift.engine.models.heads import Policy, ScoreModel, verify_head
from gearshift.engine.models.load import place_buffers
from gearshift.engine.models.scoring import forwards, policy_logprobs
from gearshift.engine.streaming.engine import StreamedEngine, Traffic


class Reference:
    """The frozen policy that the KL is measured against."""

    def __init__(self, lm: nn.Module, ppo: PPOConfig, temperature: float, settings: dict):
        self.engine = frozen_engine(Policy(lm), settings)
        verify_head(self.engine)
        self.ppo, self.temperature = ppo, temperature
        self._meter = _Meter(self.engine)

    def moved(self) -> dict[str, float]:
        """What streaming its weights took since the last call: see _Meter.read."""
        return self._meter.read()

    def logprobs(self, rollout: Rollout) -> Tensor:
        """[B, R] log-probs of the responses."""
        return policy_logprobs(self.engine, rollout, self.ppo.score_batch_size, self.temperature)


class RewardModel:
    """A frozen sequence classifier with one label."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, settings: dict):
        self.engine = frozen_engine(ScoreModel(model), settings)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._meter = _Meter(self.engine)

    def moved(self) -> dict[str, float]:
        """What streaming its weights took since the last call: see _Meter.read."""
        return self._meter.read()

    @torch.no_grad()
    def score_ids(self, sequences: list[list[int]]) -> Tensor:
        """[B] float32 scores of token sequences; every rank must pass equally many."""
        inputs, device = [], self.engine.device
        for start in range(0, len(sequences), self.batch_size):
            rows = [torch.tensor(s) for s in sequences[start : start + self.batch_size]]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            inputs.append((ids, torch.arange(ids.shape[1], device=device) < lengths[:, None]))
        return torch.cat(list(forwards(self.engine, inputs)))


class _Meter:
    """Counts between two looks at an engine's traffic."""

    def __init__(self, engine: Any):
        self._engine, self._seen = engine, Traffic()
        self.read()

    def read(self) -> dict[str, float]:
        """Since the last call: `ratio`, bytes moved over the least; `gb`, moved by one rank.

        Empty where no weights moved.
        """
        now = replace(getattr(self._engine, "traffic", self._seen))
        new, self._seen = now - self._seen, now
        return {"ratio": new.ratio, "gb": new.bytes_moved / 1e9} if new.passes else {}


def frozen_engine(module: nn.Module, settings: dict) -> deepspeed.DeepSpeedEngine | StreamedEngine:
    """An engine without an optimizer. settings: the role's DeepSpeed JSON."""
    module.requires_grad_(False)
    if offloaded(settings, "param"):
        cuda = torch.cuda.is_available()
        place = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        return StreamedEngine(module, place)
    engine, *_ = deepspeed.initialize(model=module, config=settings)
    place_buffers(engine)
    engine.eval()
    return engine
