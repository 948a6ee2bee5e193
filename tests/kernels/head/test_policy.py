"""The closed form of the loss's derivative against autograd through the formula."""

import math

import pytest
import torch

from gearshift.kernels.head.policy import Objective, PolicyRows, policy_loss_reference

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
OBJECTIVES = {
    "dual clip": {"dual_clip": 1.5},
    "k1": {"kl_loss_coef": 0.3, "kl_estimator": "k1"},
    "k2 dual": {"kl_loss_coef": 0.3, "kl_estimator": "k2", "dual_clip": 3.0},
    "k3": {"kl_loss_coef": 0.3},
    "entropy bonus": {"entropy_coef": 0.2},
    "all": {"kl_loss_coef": 0.1, "dual_clip": 2.0, "entropy_coef": -0.05},
    "cispo": {"policy_loss": "cispo"},
    "sapo": {"policy_loss": "sapo", "kl_loss_coef": 0.1},
    "sapo, steep": {"policy_loss": "sapo", "sapo_tau": (3.0, 0.5)},
    "dis": {"policy_loss": "dis", "entropy_coef": 0.2},
    "gspo": {"policy_loss": "gspo"},
    "gspo dual": {"policy_loss": "gspo", "dual_clip": 2.0},
}


def policy_rows(objective, dtype=torch.float64):
    """Every sign of A with every place the ratio can lie, log-ratios past the clamp included."""
    offsets = torch.tensor([-30.0, -19.0, -1.0, -0.1, 0.0, 0.1, 0.24, 1.0, 2.0, 19.0, 30.0])
    offset, advantage = torch.cartesian_prod(offsets, torch.tensor([-1.5, -0.5, 0.5, 2.0])).unbind(
        1
    )
    logprobs = torch.linspace(-9, -0.01, len(offset))
    columns = [torch.linspace(0.1, 1, len(offset)), logprobs - offset, advantage]
    ref = logprobs + torch.linspace(-25, 25, len(offset))
    columns.append(ref)
    if objective.get("policy_loss") == "gspo":
        columns.append(0.7 * offset.flip(0))  # a sequence's ratio, which is not its tokens'
    rows = PolicyRows(Objective(**CLIP, **objective), *(c.to(dtype) for c in columns))
    return logprobs.to(dtype), rows


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_closed_form_is_the_derivative(objective):
    logprobs, rows = policy_rows(objective)
    entropy = torch.linspace(0, 5, len(logprobs), dtype=torch.float64)
    leaf = logprobs.clone().requires_grad_()
    expected = policy_loss_reference(leaf, entropy, rows)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    loss, dlogp, _ = rows.terms(logprobs, entropy)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dlogp, slope, rtol=1e-12, atol=1e-12)


def by_hand(policy_loss, log_ratio, advantage, logprob=-1.0, **objective):
    """(loss, dloss/dlogp, clipped) of one token of weight 1."""
    columns = (torch.tensor([x], dtype=torch.float64) for x in (1, logprob - log_ratio, advantage))
    sequence = torch.tensor([log_ratio], dtype=torch.float64) if policy_loss == "gspo" else None
    rows = PolicyRows(
        Objective(**CLIP, policy_loss=policy_loss, **objective), *columns, None, sequence
    )
    zero = torch.zeros(1, dtype=torch.float64)
    return [float(x) for x in rows.terms(torch.tensor([logprob]).double(), zero)]


TWICE, HALF = math.log(2), -math.log(2)
# Worked out on paper at ratio 2 or 1/2, clip 0.8 to 1.28, log-prob -1.
GOLDEN = [
    (("ppo", TWICE, 3.0), (-3.84, 0, 1)),
    (("ppo", TWICE, -3.0), (6, 6, 0)),
    (("gspo", HALF, 3.0), (-1.5, -1.5, 0)),
    (("gspo", HALF, -3.0), (2.4, 0, 1)),
    (("cispo", TWICE, 3.0), (3.84, -3.84, 1)),  # clipped, and yet with a gradient
    (("cispo", HALF, -3.0), (-2.4, 2.4, 1)),
    (("dis", TWICE, 3.0), (0, 0, 1)),
    (("dis", TWICE, -3.0), (0, 0, 1)),  # PPO's min would keep this one
    (("dis", 0.0, -3.0), (3, 3, 0)),
    # sigmoid(1) = 0.7310585786, times its complement 0.1966119332
    (("sapo", TWICE, 3.0), (-12 * 0.7310585786300049, -24 * 0.19661193324148185, 0)),
    # tau 1.05: sigmoid(1.05) = 0.7407748991, times its complement 0.1920274479
    (("sapo", TWICE, -3.0), (12 / 1.05 * 0.740774899182154, 24 * 0.19202744792382356, 0)),
    (("sapo", 0.0, 3.0), (-6, -3, 0)),  # at ratio 1 the gradient is PPO's
]


@pytest.mark.parametrize("given, expected", GOLDEN, ids=str)
def test_golden_numbers(given, expected):
    assert by_hand(*given) == pytest.approx(list(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"policy_loss": "grpo"}, "policy_loss='grpo': choose one of ppo, gspo, cispo"),
        ({"policy_loss": "cispo", "dual_clip": 3.0}, "dual_clip=3.0: policy_loss=cispo has none"),
        ({"policy_loss": "sapo", "sapo_tau": (0.0, 1.0)}, "sapo_tau=.*above 0"),
    ],
)
def test_what_makes_no_sense_is_named(wrong, told):
    with pytest.raises(ValueError, match=told):
        Objective(**CLIP, **wrong)
