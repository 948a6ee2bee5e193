"""python -m pytest tests/kernels/test_sample.py"""

import math

import pytest
import torch

from gearshift.kernels.sample import philox_uniform, sample_tokens

BACKENDS = ("torch", "triton")
PLAIN = dict(temperature=1.0, top_k=0, top_p=1.0)
SETTINGS = [
    PLAIN,
    dict(temperature=0.7, top_k=0, top_p=1.0),
    dict(temperature=1.0, top_k=5, top_p=1.0),
    dict(temperature=1.3, top_k=0, top_p=0.8),
    dict(temperature=0.8, top_k=12, top_p=0.6),
]


def make(B, V, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(B, V, generator=g)).to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,), generator=g)
    return logits, dict(seeds=seeds, positions=torch.arange(B) * 7 + (5 << 31))


def distribution(logits, temperature, top_k, top_p):
    """[V] float64: top-k, then top-p of what is left, by sorting; ties with the last kept stay."""
    p = torch.softmax(logits.double() / temperature, 0)
    if top_k:
        p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0)
        p = p / p.sum()
    if top_p < 1:
        ranked = p.sort(descending=True).values
        last = int((ranked.cumsum(0) < top_p).sum())
        p = torch.where(p >= ranked[last], p, 0)
    return p / p.sum()


def chi_square(counts, p):
    """Statistic minus its critical value at 4 standard deviations (Wilson and Hilferty 1931)."""
    assert counts[p == 0].sum() == 0, "drew a token outside the kept set"
    expected = p[p > 0] * counts.sum()
    assert expected.min() > 5
    freedom = len(expected) - 1
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
    width = 2 / (9 * freedom)
    return statistic - freedom * (1 - width + 4 * math.sqrt(width)) ** 3


def philox4x32(counter, key):
    """Philox-4x32-10 as published, on Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (odd >> 32) ^ c1 ^ k0, odd & 0xFFFFFFFF
        c2, c3 = (even >> 32) ^ c3 ^ k1, even & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_philox_is_the_published_one():
    """Known answers of Random123's kat_vectors, then ours against it on any 64-bit input."""
    ones = 0xFFFFFFFF
    assert philox4x32((0,) * 4, (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones, ones))[0] == 0x408F276D
    _, keys = make(50, 1)
    keys["positions"] = keys["positions"] * -(2**55) - 1
    for seed, position, got in zip(*keys.values(), philox_uniform(**keys), strict=True):
        words = [x.item() >> shift & ones for x in (position, seed) for shift in (0, 32)]
        assert got == philox4x32((*words[:2], 0, 0), words[2:])[0]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_follow_the_distribution(setting, vary):
    N, V = 40_000, 20
    logits, _ = make(1, V, seed=3)
    logits = (logits / 2).clamp(min=-1.5)
    keys = dict.fromkeys(("seeds", "positions"), torch.full((N,), 11)) | {vary: torch.arange(N)}
    tokens, _ = sample_tokens(logits.expand(N, V), **setting, **keys, backend="torch")
    counts = tokens.bincount(minlength=V)
    assert chi_square(counts, distribution(logits[0], **setting)) < 0
    other = distribution(logits[0], **(setting | dict(temperature=1.15 * setting["temperature"])))
    assert chi_square(counts, other) > 0, "the test could not tell another temperature"


@pytest.mark.parametrize("setting", [dict(top_k=2, top_p=1.0), dict(top_k=0, top_p=0.3)])
def test_ties_at_the_threshold_are_all_kept(setting):
    logits = torch.tensor([[0.0, 2.0, -1.0, 2.0, 0.0, 2.0]]).expand(3000, 6)
    keys = dict(seeds=torch.arange(3000), positions=torch.zeros(3000, dtype=torch.int64))
    tokens, _ = sample_tokens(logits, temperature=1.0, **setting, **keys, backend="torch")
    third = torch.tensor([0, 1, 0, 1, 0, 1]).double() / 3
    assert chi_square(tokens.bincount(minlength=6), third) < 0
    few = {name: key[:8] for name, key in keys.items()}
    same, _ = sample_tokens(logits[:8], temperature=1.0, **setting, **few, backend="triton")
    assert torch.equal(same, tokens[:8])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_exactly_on_a_boundary_belongs_to_the_next_token(backend):
    """Equal logits: the token is floor(u * V), also where u * V is whole.

    The first seed lands on the first token of a block, the second inside one.
    """
    V, seeds = 1 << 20, torch.tensor([590814, 862])
    keys = dict(seeds=seeds, positions=torch.zeros_like(seeds))
    u = philox_uniform(**keys) >> 1
    assert u[0] % (2**31 // V * 2048) == 0 and u[1] % (2**31 // V) == 0
    tokens, logprobs = sample_tokens(torch.zeros(2, V), **PLAIN, **keys, backend=backend)
    assert torch.equal(tokens, u * V >> 31)
    assert logprobs[0].item() == pytest.approx(-math.log(V))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nucleus_of_exactly_top_p_is_enough(backend):
    """At T = log2(e) the weights are powers of two: shares 1/2, 1/4, 1/4."""
    logits = torch.tensor([[-1.0, 0.0, -1.0]]).expand(6, 3)
    keys = dict(seeds=torch.arange(6), positions=torch.zeros(6, dtype=torch.int64))
    setting = dict(temperature=math.log2(math.e), top_k=0)
    half, _ = sample_tokens(logits, **setting, top_p=0.5, **keys, backend=backend)
    more, _ = sample_tokens(logits, **setting, top_p=0.51, **keys, backend=backend)
    assert half.tolist() == [1] * 6
    assert more.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "V, dtype",
    [
        (1, torch.bfloat16),
        (7, torch.float16),
        (2048, torch.bfloat16),
        (2049, torch.float32),
        (5003, torch.float32),
        pytest.param(5003, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_backends_agree_token_for_token(V, dtype, monkeypatch):
    logits, keys = make(3, V, dtype)
    logits[0, V // 2] = -0.0  # equal to 0.0, with other bits
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(-7))
    for setting in [*SETTINGS, dict(temperature=0, top_k=3, top_p=0.5)]:
        tokens, logprobs = sample_tokens(logits, **setting, **keys, backend="torch")
        same, close = sample_tokens(logits, **setting, **keys, backend="triton")
        assert tokens.dtype == same.dtype == torch.int64
        assert torch.equal(tokens, same), setting
        exact = torch.log_softmax(logits.double() / (setting["temperature"] or 1.0), 1)
        exact = exact.gather(1, tokens[:, None])[:, 0]
        for got in (logprobs, close):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), exact, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [PLAIN, dict(temperature=0.9, top_k=0, top_p=0.9)])
def test_a_row_does_not_see_its_batch(backend, setting):
    B, V = (130, 5003) if backend == "torch" else (4, 2100)  # 130 rows: several chunks
    logits, keys = make(B, V)
    tokens, logprobs = sample_tokens(logits, **setting, **keys, backend=backend)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    moved = {name: key[order] for name, key in keys.items()}
    again = sample_tokens(logits[order], **setting, **moved, backend=backend)
    assert torch.equal(again[0], tokens[order]) and torch.equal(again[1], logprobs[order])
    alone = {name: key[2:3] for name, key in keys.items()}
    token, logprob = sample_tokens(logits[2:3], **setting, **alone, backend=backend)
    assert (token, logprob) == (tokens[2], logprobs[2])
    assert tokens.unique().numel() > B // 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_and_position_both_count(backend):
    B = 6
    logits = torch.zeros(B, 4096)
    base = dict(seeds=torch.full((B,), 5), positions=torch.full((B,), 5))
    varied = [
        base | dict(seeds=torch.arange(B)),
        base | dict(seeds=torch.arange(B) << 32),
        base | dict(positions=torch.arange(B)),
        base | dict(positions=torch.arange(B) << 32),
    ]
    state = torch.get_rng_state()
    for keys in varied:
        assert sample_tokens(logits, **PLAIN, **keys, backend=backend)[0].unique().numel() == B
    assert sample_tokens(logits, **PLAIN, **base, backend=backend)[0].unique().numel() == 1
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_is_sharp_is_greedy(backend):
    logits, keys = make(4, 2500)
    logits[0, [40, 500, 2088]] = 50.0  # 2088 = 40 + 2048: the same lane of the next block
    tokens, logprobs = sample_tokens(
        logits, temperature=0.0, top_k=0, top_p=1.0, **keys, backend=backend
    )
    assert tokens[0] == 40, "a tie goes to the lowest index"
    exact = torch.log_softmax(logits.double(), 1).max(1).values
    torch.testing.assert_close(logprobs.double(), exact, rtol=5e-7, atol=5e-7)
    for sharp in (dict(temperature=1e-6), dict(top_k=1), dict(top_p=1e-12), dict(top_p=1e-3)):
        got, _ = sample_tokens(logits, **(PLAIN | sharp), **keys, backend=backend)
        assert torch.equal(got[1:], tokens[1:]), sharp
        assert got[0] in (40, 500, 2088), sharp


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [PLAIN, dict(temperature=1.0, top_k=4, top_p=0.9)])
def test_extreme_logits(backend, setting):
    inf = math.inf
    logits = torch.full((4, 2500), -inf)
    logits[0, 2400] = -1e4  # the only token there is
    logits[1, 7], logits[1, 9], logits[1, 11] = 1e4, 1e4, -1e4
    logits[2, 30:33] = torch.tensor([1.0, 2.0, 3.0]) + 1e6
    logits[3] = torch.finfo(torch.float32).min
    logits[3, 2077] = torch.finfo(torch.float32).max
    keys = dict(seeds=torch.arange(4), positions=torch.arange(4))
    tokens, logprobs = sample_tokens(logits, **setting, **keys, backend=backend)
    assert tokens[0] == 2400 and logprobs[0] == 0
    assert tokens[1] in (7, 9) and logprobs[1].item() == pytest.approx(-math.log(2))
    expected = torch.log_softmax(torch.tensor([1.0, 2.0, 3.0]), 0)[tokens[2] - 30]
    assert tokens[2] in (30, 31, 32) and logprobs[2].item() == pytest.approx(expected.item())
    assert tokens[3] == 2077 and logprobs[3] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "setting", [PLAIN, PLAIN | dict(temperature=0.0), dict(temperature=1.0, top_k=3, top_p=0.9)]
)
def test_broken_rows_say_so_and_spoil_no_other(backend, setting):
    logits, keys = make(5, 2050, torch.bfloat16)
    options = dict(**setting, **keys, backend=backend)
    clean = sample_tokens(logits, **options)
    logits[1, 2049], logits[2, 3], logits[3] = math.nan, math.inf, -math.inf
    tokens, logprobs = sample_tokens(logits, **options)
    assert tokens[1:4].tolist() == [0, 0, 0] and logprobs[1:4].isnan().all()
    assert torch.equal(tokens[::4], clean[0][::4]) and torch.equal(logprobs[::4], clean[1][::4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    logits, keys = make(3, 100)
    expected = sample_tokens(logits, **PLAIN, **keys, backend=backend)
    last = torch.stack([logits + 1, logits], 1)[:, -1]
    keys["seeds"] = torch.stack([keys["seeds"], keys["seeds"] + 1], 1)[:, 0]
    for view in (last, logits.T.contiguous().T):
        assert not view.is_contiguous()
        got = sample_tokens(view, **PLAIN, **keys, backend=backend)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    logits, keys = make(0, 10)
    tokens, logprobs = sample_tokens(logits, **PLAIN, **keys, backend=backend)
    assert tokens.shape == logprobs.shape == (0,)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(2, 3, 4)), "logits"),
        (dict(logits=torch.zeros(2, 0)), "logits"),
        (dict(logits=torch.zeros(2, 4, dtype=torch.float64)), "logits"),
        (dict(seeds=torch.zeros(3, dtype=torch.int64)), "seeds"),
        (dict(seeds=torch.zeros(2, dtype=torch.int32)), "seeds"),
        (dict(positions=torch.zeros(2)), "positions"),
        (dict(positions=torch.zeros(2, dtype=torch.int64, device="meta")), "positions"),
        (dict(temperature=-0.5), "temperature=-0.5"),
        (dict(temperature=1e-9), "temperature=1e-09"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=2.5), "top_k=2.5"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(backend="numpy"), "backend='numpy'"),
    ],
)
def test_bad_input_is_named(change, message):
    logits, keys = make(2, 4)
    with pytest.raises(ValueError, match=message):
        sample_tokens(**(dict(logits=logits, **PLAIN, **keys) | change))
