"""What runs inside an engine's forward: trunk, then the head on response tokens only.

B rows, T = P + R tokens of prompt and response, N live response tokens of a micro-batch, H hidden
size, V vocabulary. The language head is never a module call: its weight goes to a kernel that takes
log-probs in chunks, so no [B, T, V] tensor exists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.engine.zero.layout import gathered
from gearshift.kernels import ops


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


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, T] int64: live tokens numbered from 0, whatever the padding on the left."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, H] of the trunk, without its head."""
    output = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    )
    return output.last_hidden_state


class Policy(nn.Module):
    """A causal LM whose head is a kernel: `head(hidden [N, H], weight [V, H], bias [V] | None)`."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.options = HeadOptions.of(lm.config)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, predicted: Tensor, head: Callable
    ) -> Any:
        """predicted [B, R] bool: the last R tokens whose log-probs the head is given, in order."""
        hidden = hidden_states(self.lm, input_ids, attention_mask)
        length = predicted.shape[1]
        rows = hidden[:, -length - 1 : -1][predicted]
        output = self.lm.get_output_embeddings()
        bias = getattr(output, "bias", None)
        with gathered(output.weight, bias):
            return head(rows, output.weight, bias)


@torch.no_grad()
def verify_head(engine: Any) -> None:
    """Raises ValueError for a family whose logits are not the map that HeadOptions describes.

    engine: of a Policy, at any ZeRO stage. Two tokens are scored by the model's own forward and by
    trunk and head apart: the least likely ones, where scales and caps show most. Two forwards of
    three tokens; a collective under ZeRO-3.
    """
    policy, lm = engine.module, engine.module.lm
    run = getattr(engine, "together", lambda calls: [call() for call in calls])
    ids = torch.arange(3, device=engine.device)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    settings = {"position_ids": position_ids(mask), "use_cache": False}
    logits = run([lambda: lm(ids, attention_mask=mask, **settings).logits[0, :2]])[0]
    eps, logits = torch.finfo(logits.dtype).eps, logits.float()
    own, rarest = logits.log_softmax(-1).min(-1)

    def apart() -> Tensor:
        hidden, output = hidden_states(lm, ids, mask)[0, :2], lm.get_output_embeddings()
        bias, options = getattr(output, "bias", None), vars(policy.options)
        with gathered(output.weight, bias):
            return ops.linear_logprob(hidden, output.weight, rarest, bias=bias, **options)[0]

    error = float((run([apart])[0] - own).abs().max())
    # The model rounds its logits to its own dtype, we do not.
    if not error <= 1e-4 + 2 * eps * float(logits.abs().max()):
        raise ValueError(
            f"path={lm.name_or_path!r}: {type(lm).__name__} makes its logits in a way that is not "
            f"supported: its log-probs differ from ours by {error:.2g} nats; choose another family"
        )


class ValueModel(nn.Module):
    """A per-token scalar head; V_t is read where token t is predicted, before it is seen."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """[B, R + 1] float32: the value before each of `length` response tokens, and after all."""
        hidden = hidden_states(self.model, input_ids, attention_mask)
        return self.model.score(hidden[:, -length - 1 :]).squeeze(-1).float()


class ScoreModel(nn.Module):
    """A sequence score, read at the last live token whatever the pad id is."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B] float32; rows are right-padded."""
        if not isinstance(getattr(self.model, "score", None), nn.Linear):  # encoders such as BERT
            live = attention_mask.long()  # some subtract it
            return self.model(input_ids=input_ids, attention_mask=live).logits[:, 0].float()
        hidden = hidden_states(self.model, input_ids, attention_mask)
        last = attention_mask.long().sum(1) - 1
        rows = hidden[torch.arange(len(last), device=last.device), last]
        return self.model.score(rows)[:, 0].float()
