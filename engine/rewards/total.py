"""Scores of a rollout: the weighted sum of functions, endpoints and reward models.

Every rank scores its own rows. Shaping (affine, clip, missing end token) is objective.py's.
"""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gearshift.engine.batch import Rollout
from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import GuardConfig, RewardConfig
from gearshift.engine.rewards.functions import FunctionReward, checked_scores
from gearshift.engine.rewards.http import HttpReward
from gearshift.engine.rewards.text import (
    Answer,
    RewardError,
    TextRows,
    read_rows,
    render_for_reward,
)

__all__ = ["RewardError", "RewardSum", "Scorer", "Scores", "read_rows", "render_for_reward"]

log = logging.getLogger(__name__)

MAX_TOKENS = 4096  # of max_tokens=null


class Scores(NamedTuple):
    """What all rewards together make of this rank's rows, failed ones settled."""

    total: Tensor  # [B] float32, the weighted sum
    by_name: dict[str, Tensor]  # [B] float32, each reward's own, unweighted
    teaches: Tensor  # [B] bool, False where a row must not move the policy
    failed: int  # rows without a score of their own, over all ranks
    fault: str  # why, of one of them; the same text on every rank
    usable: bool  # some row of every reward has a score
    by_token: Tensor | None  # [B, R] float32, what of `total` belongs to tokens of its own


class Scorer(Protocol):
    """A reward model, as the roles provide it."""

    tokenizer: Any

    def score_ids(self, rows: list[list[int]]) -> Tensor:
        """[B] scores of B rows of token ids, each read at its last token."""
        ...

    def moved(self) -> dict[str, float]:
        """Figures of the weights that came to the device since the last call; none if all stay."""
        ...


class ModelReward:
    """Scores from a reward model, whose tokenizer may differ from the policy's."""

    def __init__(self, config: RewardConfig):
        assert config.path is not None
        self.name, self.config = config.name, config
        self._warned = False
        self.limit = config.max_tokens or MAX_TOKENS

    def fit(self, positions: int | None) -> None:
        """Reads no more than the model has positions for (None: any number).

        Raises ConfigError, its key the field's name, where the configuration asks for more.
        """
        if positions is None or self.limit <= positions:
            return
        if self.config.max_tokens is not None:
            problem = f"{self.config.path!r} has {positions} positions"
            fix = f"use {positions} or fewer"
            raise ConfigError("max_tokens", problem, fix, value=self.limit)
        self.limit = positions
        log.warning(
            "reward %r: it reads the last %d tokens of a row, as many as it has positions "
            "(rewards max_tokens=null)",
            self.name,
            positions,
        )

    def check(self, columns: Collection[str] | None) -> None:
        """A reward model reads no columns."""

    def scores(self, rows: TextRows, scorer: Scorer, policy_tokenizer: Any) -> Answer:
        """One score per row; a longer row keeps its last `limit` tokens."""
        token_ids, refused = [], None
        try:
            token_ids = self._tokens(rows, scorer, policy_tokenizer)
        except RewardError as error:
            refused = str(error)
        # Scoring is a collective: no rank may begin it without the others.
        for told in filter(None, distributed.all_gather_objects(refused)):
            raise RewardError(told)
        limit = self.limit
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
        first = getattr(scorer.tokenizer, "cls_token_id", None)
        shortened = [_last(ids, limit, first) for ids in token_ids]
        return checked_scores(self.name, scorer.score_ids(shortened).detach(), rows)

    def _tokens(self, rows: TextRows, scorer: Scorer, policy_tokenizer: Any) -> list[list[int]]:
        token_ids = render_for_reward(
            rows, policy_tokenizer, scorer.tokenizer, chat_template=self.config.chat_template
        )
        if not all(token_ids):
            empty = rows.row(token_ids.index([]))
            raise RewardError(f"reward {self.name!r}: its tokenizer makes no token of {empty}")
        return token_ids


def _last(ids: list[int], limit: int, first: int | None) -> list[int]:
    """The last tokens of a row, after its `first`: an encoder's score is read there."""
    if len(ids) <= limit:
        return ids
    opening = ids[:1] if ids[0] == first else []
    return opening + ids[len(ids) - limit + len(opening) :]


_KINDS = {"function": FunctionReward, "http": HttpReward, "model": ModelReward}


class RewardSum:
    """All rewards of a run, added with their weights.

    Making one imports the functions and reads their signatures, so that a mistake is met before
    any model is loaded; it raises RewardError (a ValueError). Reward models are joined later.
    """

    def __init__(self, configs: list[RewardConfig], guards: GuardConfig | None = None):
        """guards: what follows where a reward fails; None: the defaults."""
        assert configs and len({config.name for config in configs}) == len(configs)
        self._scorers: Mapping[str, Scorer] = {}
        self._guards = guards or GuardConfig()  # type: ignore[call-arg]
        self._weights = {config.name: config.weight for config in configs}
        self._sources: list[Any] = [_KINDS[config.kind](config) for config in configs]

    @property
    def names(self) -> list[str]:
        return list(self._weights)

    @property
    def model_configs(self) -> list[RewardConfig]:
        """The rewards for which `join` must be given a model."""
        return [source.config for source in self._sources if isinstance(source, ModelReward)]

    def fit(self, name: str, positions: int | None) -> None:
        """Tells the reward model `name` how many tokens its model can read; see ModelReward."""
        next(source for source in self._sources if source.name == name).fit(positions)

    def join(self, scorers: Mapping[str, Scorer]) -> None:
        """Takes the loaded reward models: one for each of `model_configs`, by its name."""
        assert set(scorers) == {config.name for config in self.model_configs}
        self._scorers = dict(scorers)

    def moved(self) -> dict[str, dict[str, float]]:
        """By reward model: what streaming its weights took since the last call."""
        return {name: scorer.moved() for name, scorer in self._scorers.items()}

    def check(self, columns: Collection[str]) -> None:
        """Raises RewardError when a reward needs a dataset column that is not among `columns`."""
        for source in self._sources:
            source.check(columns)

    def scores(self, rollout: Rollout, tokenizer: Any) -> Scores:
        """Scores of this rank's rows. A collective. tokenizer: the policy's.

        A score that is missing or not finite is settled as `guards.failed_reward` says. Raises
        RewardError, on every rank, where that says stop or more than `failed_reward_share` of all
        rows fail; and for answers that are none: a wrong count, or no numbers. It shows a row.
        """
        rows, refused = read_rows(rollout, tokenizer), None
        try:
            answers = [self._score(source, rows, tokenizer) for source in self._sources]
        except RewardError as error:  # on this rank alone, perhaps: the others must hear of it
            answers, refused = [Answer([math.nan] * len(rollout), {}) for _ in self._sources], error
        table = torch.tensor(
            [answer.scores for answer in answers],
            dtype=torch.float64,
            device=rollout.response_ids.device,
        )
        scored = ~table.isnan()  # [rewards, B]
        whole = scored.all(0)
        sums = torch.stack([table.nansum(1), scored.sum(1)])
        counts = sums.new_tensor([int((~whole).sum()), len(whole), refused is not None])
        distributed.barrier()  # a sandbox or an endpoint may keep one rank for long
        reduced = distributed.global_sum(torch.cat([sums.flatten(), counts]))
        (totals, numbers), (failed, everyone, odd) = reduced[:-3].view(2, -1), reduced[-3:].tolist()
        if odd:
            told = distributed.all_gather_objects(None if refused is None else str(refused))
            raise RewardError(next(text for text in told if text)) from refused
        fault = self._judge_faults(answers, int(failed), int(everyone)) if failed else ""
        table = torch.where(scored, table, (totals / numbers.clamp(min=1))[:, None]).float()
        by_name = dict(zip(self._weights, table, strict=True))
        usable = bool((numbers > 0).all())
        dropped = not usable or self._guards.failed_reward == "drop"
        by_token = self._by_token(answers, rollout)
        return Scores(
            total=self._total(by_name, answers, by_token),
            by_name=by_name,
            teaches=whole if dropped else torch.ones_like(whole),
            failed=int(failed),
            fault=fault,
            usable=usable,
            by_token=by_token,
        )

    def _by_token(self, answers: list[Answer], rollout: Rollout) -> Tensor | None:
        """[B, R] weighted rewards of tokens; None where no reward of this rank has any."""
        if not any(answer.tokens for answer in answers):
            return None
        summed = torch.zeros_like(rollout.rollout_logprobs)
        for weight, answer in zip(self._weights.values(), answers, strict=True):
            for row, tokens in answer.tokens.items():
                summed[row, rollout.response_mask[row]] += weight * summed.new_tensor(tokens)
        return summed

    def _total(
        self, by_name: dict[str, Tensor], answers: list[Answer], by_token: Tensor | None
    ) -> Tensor:
        """[B] the weighted sum. Rewards of tokens are added as they are placed, so that what is
        left for the last token is exactly 0 where there is nothing else."""
        total: Any = 0 if by_token is None else by_token.sum(1)
        for (name, scores), answer in zip(by_name.items(), answers, strict=True):
            if answer.tokens:
                scores = scores.clone()
                scores[list(answer.tokens)] = 0.0
            total = total + self._weights[name] * scores
        return total

    def _judge_faults(self, answers: list[Answer], failed: int, everyone: int) -> str:
        """One rank's first fault, on every rank; raises it where the run should stop."""
        mine = next((fault for a in answers for _, fault in sorted(a.faults.items())), None)
        told = distributed.all_gather_objects(None if mine is None else str(mine))
        fault = next(text for text in told if text is not None)
        share = self._guards.failed_reward_share
        if self._guards.failed_reward == "stop" or failed > share * everyone:
            raise RewardError(
                f"{fault} ({failed} of {everyone} samples; guards.failed_reward="
                f"{self._guards.failed_reward}, guards.failed_reward_share={share:g})"
            ) from (mine and mine.__cause__)
        return fault

    def _score(self, source: Any, rows: TextRows, tokenizer: Any) -> Answer:
        if isinstance(source, ModelReward):
            assert source.name in self._scorers, f"no reward model was joined for {source.name!r}"
            return source.scores(rows, self._scorers[source.name], tokenizer)
        return source.scores(rows)
