"""logprob_entropy and linear_logprob against float64, on both backends."""

import pytest
import torch

from gearshift.kernels import dispatch, ops
from gearshift.kernels.head.scores import LogitMap, logprob_entropy_reference, score_triton
from tests.tiny.poison import poison_allocations

BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no triton")),
]
DTYPES = [torch.float32, torch.bfloat16]
EPSILON = 3e-6  # nats; 16 ulp of the row's largest logit would be 4e-6 at 30


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_allocations(monkeypatch)


def random_logits(rows, vocab, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 4
    return logits.to(dtype), torch.randint(vocab, (rows,), generator=generator)


def errors(found, exact):
    pairs = zip(found, exact, strict=True)
    return [(f.double() - e).abs().max().item() for f, e in pairs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [129, 1000, 1024, 5003])
@pytest.mark.parametrize("rows, temperature", [(1, 1.0), (31, 0.7), (33, 1.3)])
def test_matches_float64(backend, dtype, vocab, rows, temperature):
    logits, token_ids = random_logits(rows, vocab, dtype)
    before = logits.clone()
    found = ops.logprob_entropy(logits, token_ids, temperature=temperature, backend=backend)
    assert [f.dtype for f in found] == [torch.float32] * 2
    assert torch.equal(logits, before)

    logit_map = LogitMap.of(temperature)
    exact = logprob_entropy_reference(logits.double(), token_ids, logit_map)
    plain = logprob_entropy_reference(logits, token_ids, logit_map)
    for error, limit in zip(errors(found, exact), errors(plain, exact), strict=True):
        assert error <= 3 * limit + EPSILON
        assert error <= 1e-5  # bf16 logits included: the sums are fp32 in any case


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_rows(backend):
    logits, token_ids = random_logits(8, 5003, torch.float32)
    logits[0] -= 500
    logits[1] += 1e4
    logits[2, :4200] = -torch.inf  # the first block of a kernel holds nothing but -inf
    logits[3] = -torch.inf
    logits[3, 17] = 2.0
    logits[4] = 0.0
    logits[5, 9] = 1e4
    logits[6, 11] = -torch.inf
    token_ids[2:7] = torch.tensor([4999, 17, 0, 9, 11])
    logprobs, entropy = ops.logprob_entropy(logits, token_ids, backend=backend)
    exact = logprob_entropy_reference(logits.double(), token_ids, LogitMap.of(1.0))
    assert logprobs[6] == -torch.inf
    finite = torch.arange(8) != 6
    torch.testing.assert_close(logprobs[finite].double(), exact[0][finite], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_any_strides(backend):
    whole, token_ids = random_logits(12, 1026, torch.float32)
    token_ids %= 500
    for view in (
        whole[:, :-1],
        whole[::2],
        whole[:, ::2],
        whole.t()[:40],
        whole[:1].expand(6, -1),
    ):
        ids = token_ids.repeat(4)[: len(view)] % view.shape[1]
        found = ops.logprob_entropy(view, ids, backend=backend)
        exact = logprob_entropy_reference(view.double(), ids, LogitMap.of(1.0))
        assert max(errors(found, exact)) <= 1e-5
    strided = torch.arange(24)[::2]
    found = ops.logprob_entropy(whole, strided.int(), backend=backend)
    exact = logprob_entropy_reference(whole.double(), strided, LogitMap.of(1.0))
    assert max(errors(found, exact)) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_beyond_the_vocabulary_changes_nothing(backend):
    whole, token_ids = random_logits(5, 1152, torch.float32)
    expected = ops.logprob_entropy(whole[:, :1100].clone(), token_ids % 1100, backend=backend)
    for garbage in (torch.nan, torch.inf, 1e30):
        whole[:, 1100:] = garbage
        found = ops.logprob_entropy(whole[:, :1100], token_ids % 1100, backend=backend)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no triton")
def test_rows_beyond_two_to_the_31_elements(monkeypatch):
    """Row 2 starts at element 2^31 + 32: a product of 32-bit numbers would wrap."""
    monkeypatch.undo()  # 4 GiB that must stay untouched
    stride, vocab = (1 << 30) + 16, 300
    storage = torch.empty(2 * stride + vocab, dtype=torch.bfloat16)
    logits = storage.as_strided((3, vocab), (stride, 1))
    values, token_ids = random_logits(3, vocab, torch.bfloat16)
    logits.copy_(values)
    scores = score_triton(logits, token_ids, LogitMap.of(1.0))
    exact = logprob_entropy_reference(values.double(), token_ids, LogitMap.of(1.0))
    assert max(errors(scores[:2], exact)) <= 1e-5


HEADS = [
    {},
    {"temperature": 0.7, "logit_scale": 0.25},
    {"temperature": 1.3, "logit_softcap": 5.0},
    {"logit_softcap": 3.0, "logit_scale": 2.0, "bias": True},
    {"bias": True},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("options", HEADS)
def test_linear_logprob_matches_float64(backend, dtype, options):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(33, 24, generator=generator).to(dtype)
    weight = torch.randn(1003, 24, generator=generator).to(dtype)
    token_ids = torch.randint(1003, (33,), generator=generator)
    options = dict(options)
    if options.pop("bias", False):
        options["bias"] = torch.randn(1003, generator=generator).to(dtype)
    row = 1024 * 4
    results = [
        ops.linear_logprob(
            hidden, weight, token_ids, **options, max_logits_bytes=n * row, backend=backend
        )
        for n in (1, 7, 64)
    ]
    logits = hidden.double() @ weight.double().t()
    if "bias" in options:
        logits += options["bias"].double()
    logit_map = LogitMap.of(
        options.get("temperature", 1.0),
        options.get("logit_softcap"),
        options.get("logit_scale", 1.0),
    )
    exact = logprob_entropy_reference(logits, token_ids, logit_map)
    for found in results:
        assert max(errors(found, exact)) <= 1e-5  # fp32 logits, whatever the weights are


def test_softcap_and_scale_mean_what_models_do():
    """Gemma: c * tanh(z / c); Cohere: z * scale; both before the temperature."""
    z = torch.linspace(-40, 40, 9, dtype=torch.float64)[None]
    ids = torch.tensor([3])
    capped = (torch.tanh(z * 0.5 / 30) * 30 / 0.8).log_softmax(-1)[0, 3]
    found, _ = logprob_entropy_reference(z, ids, LogitMap.of(0.8, 30.0, 0.5))
    assert found.item() == pytest.approx(capped.item(), abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    ids = torch.zeros(0, dtype=torch.long)
    for found in (
        ops.logprob_entropy(torch.zeros(0, 7), ids, backend=backend),
        ops.linear_logprob(torch.zeros(0, 3), torch.zeros(7, 3), ids, backend=backend),
    ):
        assert [list(f.shape) for f in found] == [[0], [0]]


Z, IDS = torch.zeros(4, 9), torch.zeros(4, dtype=torch.long)
H, W = torch.zeros(4, 3), torch.zeros(9, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.logprob_entropy(Z[0], IDS), r"logits has shape \[9\]"),
        (lambda: ops.logprob_entropy(Z.double(), IDS), "logits is torch.float64"),
        (lambda: ops.logprob_entropy(Z[:, :0], IDS), "logits .* rows are empty"),
        (lambda: ops.logprob_entropy(Z, IDS[:3]), r"token_ids has shape \[3\]: must be \[4\]"),
        (lambda: ops.logprob_entropy(Z, IDS.float()), "token_ids is torch.float32"),
        (lambda: ops.logprob_entropy(Z, IDS + 9), "token_ids holds 9, .* 0..8"),
        (lambda: ops.logprob_entropy(Z, IDS - 100), "token_ids holds -100"),
        (lambda: ops.logprob_entropy(Z, IDS.to("meta")), "token_ids is on meta"),
        (lambda: ops.logprob_entropy(Z, IDS, temperature=0.0), "temperature=0.0"),
        (lambda: ops.logprob_entropy(Z, IDS, temperature=float("nan")), "temperature=nan"),
        (lambda: ops.logprob_entropy(Z, IDS, backend="cuda"), "backend='cuda'"),
        (lambda: ops.linear_logprob(H, W.t(), IDS), r"weight has shape \[3, 9\]"),
        (lambda: ops.linear_logprob(H, W.bfloat16(), IDS), "weight is torch.bfloat16"),
        (lambda: ops.linear_logprob(H, W.to("meta"), IDS), "weight is on meta"),
        (lambda: ops.linear_logprob(H, W, IDS, bias=H[0]), "bias has shape"),
        (lambda: ops.linear_logprob(H, W, IDS, logit_softcap=0.0), "logit_softcap=0.0"),
        (lambda: ops.linear_logprob(H, W, IDS, logit_scale=-1.0), "logit_scale=-1.0"),
        (lambda: ops.linear_logprob(H, W, IDS, max_logits_bytes=100), "max_logits_bytes=100.* 512"),
        (lambda: ops.linear_logprob(H, W, IDS + 9), "token_ids holds 9"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
