"""Scores of a rollout: the weighted sum of functions, endpoints and reward models.

Every rank scores its own rows. Shaping (affine, clip, missing end token) is objective.py's.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from gearshift.engine.batch import Rollout
from gearshift.engine.config import RewardConfig
from gearshift.engine.reward_functions import FunctionReward, checked_scores
from gearshift.engine.reward_http import HttpReward
from gearshift.engine.reward_text import RewardError, TextRows, read_rows, render_for_reward

__all__ = ["RewardError", "RewardSum", "Scorer", "read_rows", "render_for_reward"]

log = logging.getLogger(__name__)


class Scorer(Protocol):
    """A reward model, as the roles provide it."""

    tokenizer: Any

    def score_ids(self, rows: list[list[int]]) -> Tensor:
        """[B] scores of B rows of token ids, each read at its last token."""
        ...


class ModelReward:
    """Scores from a reward model, whose tokenizer may differ from the policy's."""

    def __init__(self, config: RewardConfig):
        if config.path is None:
            raise RewardError(f"rewards: {config.name}: path=None: kind model needs a model")
        self.name, self.config = config.name, config
        self._warned = False

    def check(self, columns: Collection[str] | None) -> None:
        """A reward model reads no columns."""

    def scores(self, rows: TextRows, scorer: Scorer, policy_tokenizer: Any) -> list[float]:
        """One finite number per row; a longer row keeps its last `max_tokens` tokens."""
        token_ids = render_for_reward(
            rows, policy_tokenizer, scorer.tokenizer, chat_template=self.config.chat_template
        )
        if not all(token_ids):
            empty = rows.row(token_ids.index([]))
            raise RewardError(f"reward {self.name!r}: its tokenizer makes no token of {empty}")
        limit = self.config.max_tokens
        longest = max(map(len, token_ids))
        if longest > limit and not self._warned:
            self._warned = True
            log.warning(
                "reward %r: a row of %d tokens is read without its beginning "
                "(rewards max_tokens=%d); said once",
                self.name,
                longest,
                limit,
            )
        return checked_scores(
            self.name, scorer.score_ids([ids[-limit:] for ids in token_ids]).detach(), rows
        )


_KINDS = {"function": FunctionReward, "http": HttpReward, "model": ModelReward}


class RewardSum:
    """All rewards of a run, added with their weights.

    Making one imports the functions and reads their signatures, so that a mistake is met before
    any model is loaded; it raises RewardError (a ValueError). Reward models are joined later.
    """

    def __init__(self, configs: list[RewardConfig]):
        if not configs:
            raise RewardError("rewards: []: give at least one source of scores")
        names = [config.name for config in configs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RewardError(f"rewards: name={twice!r} is used twice: give each its own")
        self._scorers: Mapping[str, Scorer] = {}
        self._weights = {config.name: config.weight for config in configs}
        self._sources = [_KINDS[config.kind](config) for config in configs]

    @property
    def names(self) -> list[str]:
        return list(self._weights)

    @property
    def model_configs(self) -> list[RewardConfig]:
        """The rewards for which `join` must be given a model."""
        return [source.config for source in self._sources if isinstance(source, ModelReward)]

    def join(self, scorers: Mapping[str, Scorer]) -> None:
        """Takes the loaded reward models: one for each of `model_configs`, by its name."""
        assert set(scorers) == {config.name for config in self.model_configs}
        self._scorers = dict(scorers)

    def check(self, columns: Collection[str]) -> None:
        """Raises RewardError when a reward needs a dataset column that is not among `columns`."""
        for source in self._sources:
            source.check(columns)

    def scores(self, rollout: Rollout, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores of this rank's rows.

        tokenizer: the policy's. Returns the weighted sum [B] float32 and each reward's own,
        unweighted scores by name, on the rollout's device. Raises RewardError when a reward
        fails, or gives a wrong count or a value that is not a finite number; it shows the row.
        """
        rows = read_rows(rollout, tokenizer)
        device = rollout.response_ids.device
        by_name = {
            source.name: torch.tensor(
                self._score(source, rows, tokenizer), dtype=torch.float32, device=device
            )
            for source in self._sources
        }
        total = sum(self._weights[name] * scores for name, scores in by_name.items())
        return total, by_name

    def _score(self, source: Any, rows: TextRows, tokenizer: Any) -> list[float]:
        if isinstance(source, ModelReward):
            assert source.name in self._scorers, f"no reward model was joined for {source.name!r}"
            return source.scores(rows, self._scorers[source.name], tokenizer)
        return source.scores(rows)
