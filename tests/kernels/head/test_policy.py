"""The closed form of the loss's derivative against autograd through the formula."""

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
    rows = PolicyRows(Objective(**CLIP, **objective), *(c.to(dtype) for c in (*columns, ref)))
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
