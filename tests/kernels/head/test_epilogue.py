"""The Triton kernels between logits and gradient, by themselves: dloss/dlogits row by row."""

import pytest
import torch

from gearshift.kernels.head import anchored
from gearshift.kernels.head.anchored import finish_anchored
from gearshift.kernels.head.epilogue import finish_two_pass
from gearshift.kernels.head.policy import Objective, PolicyRows, policy_loss_reference
from gearshift.kernels.head.projection import Head
from gearshift.kernels.head.scores import LogitMap, logprob_entropy_reference
from tests.tiny.poison import poison_allocations

pytest.importorskip("triton", reason="triton is not installed")

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
BF16_STORE = 8e-3  # Triton's interpreter truncates to bf16; hardware rounds, at half the error


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_allocations(monkeypatch)


@pytest.mark.parametrize("out_dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, BF16_STORE)])
@pytest.mark.parametrize("objective", [{}, {"dual_clip": 1.5, "kl_loss_coef": 0.3}])
@pytest.mark.parametrize("vocab, rows", [(129, 31), (5003, 33), (9001, 3)])
def test_anchored_kernels(out_dtype, limit, objective, vocab, rows):
    """E in bf16 beside fp32 logits is what 16-bit training on a GPU stores; rows are split over
    the vocabulary when they are few."""
    check_logit_gradient(finish_anchored, vocab, rows, objective, {}, out_dtype, limit)


def test_one_program_goes_through_a_whole_row(monkeypatch):
    """As it is from a thousand rows on; fewer rows are split instead."""
    monkeypatch.setattr(anchored, "PROGRAMS", 1)
    check_logit_gradient(finish_anchored, 9001, 3, {}, {}, torch.float32, 2e-6)


@pytest.mark.parametrize("out_dtype, limit", [(torch.float32, 4e-6), (torch.bfloat16, BF16_STORE)])
@pytest.mark.parametrize("objective", [{}, {"entropy_coef": 0.2}])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.7}])
@pytest.mark.parametrize("vocab, rows", [(129, 31), (5003, 9)])
def test_two_pass_kernels(out_dtype, limit, objective, head, vocab, rows):
    check_logit_gradient(finish_two_pass, vocab, rows, objective, head, out_dtype, limit)


def check_logit_gradient(finish, vocab, rows, objective, head, out_dtype, limit):
    """dloss/dlogits of `finish`, row by row, against autograd in float64."""
    draw = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=draw) * 3
    token_ids = torch.randint(vocab, (rows,), generator=draw)
    logit_map = LogitMap.of(0.8, **head)
    exact = logits.double().requires_grad_()
    logprobs, entropy = logprob_entropy_reference(exact, token_ids, logit_map)
    columns = [
        torch.rand(rows, generator=draw) + 0.1,
        (logprobs.detach() + 0.2 * torch.randn(rows, generator=draw)).float(),
        torch.randn(rows, generator=draw),
        (logprobs.detach() + torch.randn(rows, generator=draw)).float(),
    ]
    scalars = Objective(**CLIP, **objective)
    doubles = PolicyRows(scalars, *(c.double() for c in columns))
    loss = policy_loss_reference(logprobs, entropy, doubles)
    (expected,) = torch.autograd.grad(loss.sum(), exact)

    out = torch.empty(rows, vocab, dtype=out_dtype)
    some_head = Head(torch.zeros(vocab, 1), None, logit_map, "triton", 1)
    results, gradient = finish(logits, token_ids, PolicyRows(scalars, *columns), some_head, out=out)
    found = gradient.matrix.double() * gradient.scale.double()[:, None]
    torch.testing.assert_close(results.logprobs.double(), logprobs.detach(), rtol=0, atol=5e-6)
    torch.testing.assert_close(results.entropy.double(), entropy.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(results.loss.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    live = expected.abs().amax(dim=1) > 0
    assert torch.equal(gradient.scale != 0, live)
    assert (found - expected)[live].norm() <= limit * expected.norm()


def test_anchored_offsets_beyond_two_to_the_31(monkeypatch):
    """Row 2 starts at element 2^31 + 32: a product of 32-bit numbers would wrap."""
    monkeypatch.undo()  # 12 GiB that must stay untouched
    stride, vocab = (1 << 30) + 16, 300
    logits, out = (
        torch.empty(2 * stride + vocab, dtype=dtype).as_strided((3, vocab), (stride, 1))
        for dtype in (torch.float32, torch.bfloat16)
    )
    draw = torch.Generator().manual_seed(0)
    logits.copy_(torch.randn(3, vocab, generator=draw))
    token_ids = torch.tensor([0, 150, 299])
    small = logits.clone(memory_format=torch.contiguous_format)
    old = small.log_softmax(1).gather(1, token_ids[:, None])[:, 0]
    ones = torch.ones(3)
    rows = PolicyRows(Objective(**CLIP), ones, old, ones)
    head = Head(torch.zeros(vocab, 1), None, LogitMap(1.0), "triton", 1)
    for finish in (finish_anchored, finish_two_pass):
        _, expected = finish(small, token_ids, rows, head, out=torch.empty(3, vocab))
        _, found = finish(logits, token_ids, rows, head, out=out)
        torch.testing.assert_close(found.matrix.float(), expected.matrix, rtol=0.01, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
def test_an_anchor_too_far_off_is_reported():
    """Rows the anchored pass cannot represent get scale NaN, and only those."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 300, generator=draw)
    token_ids = torch.arange(5)
    old = logits.log_softmax(1).gather(1, token_ids[:, None])[:, 0]
    old += torch.tensor([0.0, 200.0, -15.0, -200.0, torch.nan])
    ones = torch.ones(5)
    head = Head(torch.zeros(300, 1), None, LogitMap(1.0), "triton", 1)
    rows = PolicyRows(Objective(**CLIP), ones, old, -ones)
    _, gradient = finish_anchored(logits, token_ids, rows, head, out=torch.empty(5, 300))
    assert gradient.scale.isnan().tolist() == [False, True, False, True, True]
