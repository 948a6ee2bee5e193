"""What runs inside an engine's forward: trunk, then the head on response tokens only.

N live response tokens of a micro-batch, H hidden size, V vocabulary; reading.py says what a trunk
reads. The language head is never a module call: its weight goes to a kernel that takes
log-probs in chunks, so no tensor of all logits exists.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.engine.attention import packed, trial
from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.models.reading import Reading, hidden_states, lay_out
from gearshift.engine.rollout.graphs import has_experts
from gearshift.engine.zero.layout import gathered
from gearshift.kernels import ops

logger = logging.getLogger(__name__)
_ROW = 16  # tokens of a row that shows whether a model reads all rows in one way


@dataclass(frozen=True)
class HeadOptions:
    """How a family's logits differ from hidden @ weight.T; keywords of the kernels' ops."""

    logit_softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(cls, config: Any) -> "HeadOptions":
        """From a configuration: Gemma's soft cap, Cohere's factor, Granite's divisor."""
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=scale / divisor,
        )


class Policy(nn.Module):
    """A causal LM whose head is a kernel: `head(hidden [N, H], weight [V, H], bias [V] | None)`."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.options = HeadOptions.of(lm.config)

    @property
    def model(self) -> nn.Module:
        """As ValueModel.model."""
        return self.lm

    @property
    def packs(self) -> bool:
        """Whether its trunk reads rows end to end."""
        return packed.packs(self.lm)

    def forward(self, reading: Reading, before: Tensor, head: Callable) -> Any:
        """before [N] int64: places in the reading whose next token the head is to predict."""
        rows = hidden_states(self.lm, reading, before)
        output = self.lm.get_output_embeddings()
        bias = getattr(output, "bias", None)
        with gathered(output.weight, bias):
            return head(rows, output.weight, bias)


def has_score(module: nn.Module) -> bool:
    """Whether a classifier reads its score off a trunk's hidden states, by a linear head."""
    return isinstance(getattr(module, "score", None), nn.Linear)


class ValueModel(nn.Module):
    """A per-token scalar head; V_t is read where token t is predicted, before it is seen."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def packs(self) -> bool:
        """Whether its trunk reads rows end to end."""
        return packed.packs(self.model)

    def forward(self, reading: Reading, places: Tensor) -> Tensor:
        """[N] float32: the value after the tokens at `places` [N] int64 of the reading."""
        hidden = hidden_states(self.model, reading, places)
        return self.model.score(hidden)[:, 0].float()


class ScoreModel(ValueModel):
    """A sequence score, read at the last live token whatever the pad id is."""

    def forward(self, reading: Reading, places: Tensor) -> Tensor:
        """[B] float32. An encoder such as BERT pools as it likes: its rows are right-padded."""
        if has_score(self.model):
            return super().forward(reading, places)
        assert reading.attention_mask is not None, "its rows are padded"
        live = reading.attention_mask.long()  # some subtract it
        return self.model(input_ids=reading.input_ids, attention_mask=live).logits[:, 0].float()


@torch.no_grad()
def verify_head(engine: Any) -> None:
    """Raises ValueError for a family whose logits are not the map that HeadOptions describes, or
    depend on later tokens, and pads from now on, with a warning, what cannot be read end to end.

    engine: of a Policy, at any ZeRO stage. Two tokens are scored by the model's own forward and by
    trunk and head apart, which read another sequence before them and another token after them: the
    least likely ones, where scales and caps show most. Then a longer row is read alone and beside
    another. Four forwards; a collective under ZeRO-3.
    """
    policy, lm = engine.module, engine.module.lm
    ids = torch.arange(3, device=engine.device)[None]
    settings = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    with packed.padded(lm):
        positions = ids.clone()
        logits = _alone(engine, lambda: lm(ids, position_ids=positions, **settings).logits[0, :2])
    eps, logits = torch.finfo(logits.dtype).eps, logits.float()
    own, rarest = logits.log_softmax(-1).min(-1)

    def apart() -> Tensor:
        others = torch.cat([ids[:, :2], ids[:, :1]], 1)
        hidden, output = _beside_another(lm, others)[:2], lm.get_output_embeddings()
        bias, options = getattr(output, "bias", None), vars(policy.options)
        with gathered(output.weight, bias):
            return ops.linear_logprob(hidden, output.weight, rarest, bias=bias, **options)[0]

    # The model rounds its logits to its own dtype, we do not.
    most = 1e-4 + 2 * eps * float(distributed.global_max(logits.abs().max()))

    def error() -> float:
        """The largest of any rank: all must read their rows in one way."""
        return float(distributed.global_max((_alone(engine, apart) - own).abs().max()))

    found = error()
    if policy.packs and not found <= most:
        _pad(lm)
        found = error()
    if math.isnan(found):
        problem, fix = "its logits are NaN", "compare its files with their source"
        raise ConfigError("path", problem, fix, repr(lm.name_or_path))
    if not found <= most:
        raise _unfit(
            lm,
            "makes its logits in a way that is not supported, or they depend on later tokens: its "
            f"log-probs differ from ours by {found:.2g} nats",
        )
    alike = _alike(engine)
    if policy.packs and not alike:
        _pad(lm)
        alike = _alike(engine)
    if not alike:
        raise _unfit(
            lm,
            "reads tokens otherwise where others follow them or rows are longer, so that sampling "
            "and training would not agree",
        )


def _unfit(model: Any, problem: str) -> ConfigError:
    """Of a model whose code is not what the trainer needs; the caller knows whose path it is."""
    problem = f"{type(model).__name__} {problem}"
    return ConfigError("path", problem, "choose another family", repr(model.name_or_path))


@torch.no_grad()
def verify_packing(engine: Any) -> None:
    """Pads from now on, with a warning, what cannot be read end to end.

    engine: of a ValueModel or ScoreModel. As verify_head: two forwards of a few tokens.
    """
    if engine.module.packs and not _alike(engine):
        _pad(engine.module.model)


def _alike(engine: Any) -> bool:
    """Whether all tokens but the last of a row are read alone as before another last one and beside
    another row, on every rank: all read in one way."""
    model, last = engine.module.model, _ROW - 1
    ids = torch.arange(_ROW, device=engine.device)[None] * 7 % min(model.config.vocab_size, 61)
    others = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    together = _alone(engine, lambda: _beside_another(model, others))[:last]
    with packed.padded(model):
        reading, places = lay_out(ids, torch.ones_like(ids, dtype=torch.bool), packs=False)
        alone = _alone(engine, lambda: hidden_states(model, reading, places[0]))[:last]
    error = (together - alone).abs().amax(1) / alone.abs().max()
    excess = trial.excess(error, alone.dtype, has_experts(model.config.get_text_config()))
    return bool(distributed.global_max(excess) <= 0)


def _alone(engine: Any, call: Callable[[], Tensor]) -> Tensor:
    """What a call of the engine's module returns; an engine that streams brings the weights.

    Raises ConfigError where the model's own code fails on a few tokens.
    """
    try:
        return engine.together([call])[0] if hasattr(engine, "together") else call()
    except trial.FAULTS as error:
        if not trial.is_its_own(error):
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise _unfit(engine.module.model, f"fails on a few tokens ({problem})") from error


def _beside_another(model: nn.Module, ids: Tensor) -> Tensor:
    """[T, H] of ids [1, T], read after another sequence in the same row where the model packs, and
    padded below a longer row where it does not."""
    packs, live = packed.packs(model), torch.ones_like(ids, dtype=torch.bool)
    if packs:
        rows, mask = torch.cat([ids.flip(1), ids]), live.repeat(2, 1)
    else:
        rows, mask = torch.cat([ids, ids.flip(1)], 1), torch.cat([live, ~live], 1)
        rows, mask = torch.cat([rows.flip(1), rows]), torch.cat([torch.ones_like(mask), mask])
    reading, places = lay_out(rows, mask, packs=packs)
    return hidden_states(model, reading, places[-1, : ids.shape[1]])


def _pad(model: nn.Module) -> None:
    why = f"{type(model).__name__} reads a sequence otherwise where another precedes it"
    packed.release(model, why)
    logger.warning("%s: its rows are padded: %s", model.name_or_path, why)
