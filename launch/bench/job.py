"""What benches of the main job share: its arguments, the open job, and prompts of made-up words."""

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gearshift.engine.config.errors import ConfigError

if TYPE_CHECKING:
    from gearshift.launch.session import Session

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def add_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--config, --json, the launcher's --local_rank, and any --section.key VALUE."""
    parser.add_argument("--config", metavar="FILE", required=required, help="the recipe to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(overrides=[])


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for an argument below 1."""
    for name in names:
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, "at least 1", value=getattr(args, name))


def open_job(recipe: str, overrides: list[str], **own: Any) -> "Session":
    """The job of a recipe, ready to train; it resumes nothing and logs nowhere.

    own: keys of `run` that the bench sets. A collective over the ranks.
    """
    from gearshift.engine.config import load as config_load
    from gearshift.launch.train import open_session

    own |= {"resume": "none", "trackers": "[]"}
    words = [word for key, value in own.items() for word in (f"--run.{key}", str(value))]
    return open_session(config_load.load(recipe, [*overrides, *words]))


def next_prompts(session: "Session") -> Any:
    """A PromptBatch of one step, on the device."""
    from gearshift.engine.rollout import stragglers

    prompts = stragglers.next_prompts(session.streams["prompts"], session.trainer.backlog)
    return prompts.to(session.device)


def describe(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """What was measured, and where."""
    from gearshift.launch.session import environment

    return {"recipe": recipe, "overrides": overrides, "environment": environment()}


def random_prompts(count: int, length: int, words: int, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts of `length` tokens, out of `words`, without special ones."""
    draw = random.Random(seed)
    return [[draw.randrange(len(SPECIAL), words) for _ in range(length)] for _ in range(count)]


def write_prompts(path: Path, prompts: list[list[int]]) -> None:
    """A JSONL file of the prompts as text: word w<i> for token id i."""
    texts = (" ".join(f"w{i}" for i in ids) for ids in prompts)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def write_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer of `words` tokens: the special ones, then `w4`, `w5` and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), words))]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True)
    PreTrainedTokenizerFast(tokenizer_object=core, **dict(names)).save_pretrained(folder)
