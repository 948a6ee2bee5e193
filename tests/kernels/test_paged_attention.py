"""python -m pytest tests/kernels/test_paged_attention.py"""

import math

import pytest
import torch

from gearshift.kernels.paged_attention import paged_attention

BACKENDS = ("torch", "triton")
TOLERANCES = {torch.float32: dict(rtol=3e-6, atol=3e-6), torch.bfloat16: dict(rtol=1e-2, atol=1e-2)}


def make(lengths, HQ=6, HK=2, D=40, DV=24, BS=16, dtype=torch.float32, seed=0):
    """Query, two caches, tables and lengths; blocks lie scattered, some belong to nobody."""
    g = torch.Generator().manual_seed(seed)
    S, width = len(lengths), -(-max(lengths, default=0) // BS) + 1
    NB = S * width + 3
    query = torch.randn(S, HQ, D, generator=g).to(dtype)
    key = torch.randn(NB, BS, HK, D, generator=g).to(dtype)
    value = torch.randn(NB, BS, HK, DV, generator=g).to(dtype)
    tables = torch.randperm(NB, generator=g)[: S * width].view(S, width).int()
    return query, key, value, tables, torch.tensor(lengths, dtype=torch.int32)


def attention_float64(inputs, scale, softcap=None, window=None, sinks=None):
    query, key, value, tables, lengths = inputs
    (S, HQ, _), (_, BS, HK, _) = query.shape, key.shape
    out = torch.zeros(S, HQ, value.shape[3], dtype=torch.float64)
    for s in range(S):
        n = int(lengths[s])
        live = range(0 if window is None else max(0, n - window), n)
        for h in range(HQ if n else 0):
            k = h // (HQ // HK)
            at = [(int(tables[s, t // BS]), t % BS) for t in live]
            keys = torch.stack([key[b, i, k] for b, i in at]).double()
            values = torch.stack([value[b, i, k] for b, i in at]).double()
            scores = keys @ query[s, h].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[h : h + 1].double()])
            out[s, h] = scores.softmax(0)[:n][: len(values)] @ values
    return out


def poison(inputs, window=None):
    """The same, with NaN in every slot that is not live and rubbish in the unused table entries."""
    query, key, value, tables, lengths = inputs
    BS = key.shape[1]
    live = torch.zeros(key.shape[:2], dtype=torch.bool)
    for s, n in enumerate(lengths.tolist()):
        for t in range(0 if window is None else max(0, n - window), n):
            live[int(tables[s, t // BS]), t % BS] = True
    key, value = (torch.where(live[..., None, None], x, math.nan) for x in (key, value))
    used = torch.arange(tables.shape[1]) < -(-lengths[:, None] // BS)
    return query, key, value, torch.where(used, tables, -(2**30)), lengths


@pytest.fixture
def nan_memory(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


SHAPES = {
    "lengths": dict(lengths=[0, 1, 16, 17, 256, 257, 600]),
    "one": dict(lengths=[1], HQ=1, HK=1, D=16, DV=16, BS=1),
    "group 1, odd block": dict(lengths=[30, 7], HQ=3, HK=3, D=64, DV=64, BS=7),
    "group 20": dict(lengths=[300, 45], HQ=20, HK=1, D=32, DV=48, BS=32),
    "wide values": dict(lengths=[90], HQ=4, HK=2, D=8, DV=128),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(backend, dtype, shape, nan_memory):
    inputs = make(**shape, dtype=dtype)
    scale = inputs[0].shape[2] ** -0.5
    out = paged_attention(*poison(inputs), scale=scale, backend=backend)
    assert out.dtype == dtype and not out.requires_grad
    expected = attention_float64(inputs, scale)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[dtype])
    assert torch.all(out[inputs[4] == 0] == 0)


SINKS = torch.tensor([0.0, 3.0, -50.0, 1.5, 100.0, -0.5])
RULES = {
    "softcap": dict(softcap=2.0),
    "window 1": dict(window=1),
    "window in a chunk": dict(window=40),
    "window over chunks": dict(window=300),
    "sinks": dict(sinks=SINKS),
    "all": dict(softcap=5.0, window=270, sinks=SINKS),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_rules_match_float64(backend, rules, nan_memory):
    inputs = make([0, 5, 280, 600])
    out = paged_attention(*poison(inputs, rules.get("window")), scale=0.4, **rules, backend=backend)
    expected = attention_float64(inputs, 0.4, **rules)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])
    plain = attention_float64(inputs, 0.4)
    assert (expected - plain)[3].abs().max() > 0.01, "the rule changed nothing here"


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_saturate(backend):
    """One key wins outright: its value comes out, and nothing overflows on the way."""
    inputs = make([300, 20])
    out = paged_attention(*inputs, scale=1e4, backend=backend)
    torch.testing.assert_close(out.double(), attention_float64(inputs, 1e4), rtol=1e-6, atol=1e-6)
    capped = paged_attention(*inputs, scale=1e4, softcap=3.0, backend=backend)
    expected = attention_float64(inputs, 1e4, softcap=3.0)
    torch.testing.assert_close(capped.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_has_the_same_bits_in_any_batch():
    query, key, value, tables, lengths = make([40, 520, 300])
    together = paged_attention(query, key, value, tables, lengths, scale=0.2, backend="triton")
    alone = paged_attention(
        query[2:], key, value, tables[2:, :19], lengths[2:], scale=0.2, backend="triton"
    )
    assert torch.equal(alone[0], together[2])


def test_chunks_of_rows_change_nothing(monkeypatch):
    inputs = make([0, 0, 40, 120, 300])
    whole = paged_attention(*inputs, scale=0.2, backend="torch")
    monkeypatch.setitem(paged_attention.__wrapped__.__globals__, "_GATHER_ELEMENTS", 1)
    torch.testing.assert_close(paged_attention(*inputs, scale=0.2, backend="torch"), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    query, key, value, tables, lengths = make([33, 70], DV=40)
    expected = paged_attention(query, key, value, tables, lengths, scale=0.2, backend=backend)
    both = torch.stack([key, value], 1)  # [NB, 2, BS, HK, D]
    by_head = both.transpose(2, 3).contiguous().transpose(2, 3)
    views = [
        torch.stack([query, query + 1], -1)[..., 0],
        *by_head.unbind(1),
        tables.T.contiguous().T,
        torch.stack([lengths, lengths + 1], -1)[:, 0],
    ]
    assert not any(view.is_contiguous() for view in views)
    got = paged_attention(*views, scale=0.2, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    query, key, value, tables, lengths = make([0, 0])
    for S, width in ((0, 1), (2, 0)):
        rows = (query[:S], key, value, tables[:S, :width], lengths[:S])
        out = paged_attention(*rows, scale=0.2, backend=backend)
        assert torch.equal(out, torch.zeros(S, 6, 24))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(2, 6)), "query"),
        (dict(query=torch.zeros(2, 6, 40, dtype=torch.float64)), "query"),
        (dict(query=torch.zeros(2, 5, 40)), "key_cache"),
        (dict(query=torch.zeros(2, 6, 48)), "key_cache"),
        (dict(key_cache=torch.zeros(9, 16, 2, 40, dtype=torch.bfloat16)), "key_cache"),
        (dict(value_cache=torch.zeros(9, 8, 2, 24)), "value_cache"),
        (dict(key_cache=torch.zeros(9, 16, 40, 2).transpose(2, 3)), "key_cache"),
        (dict(block_tables=torch.zeros(2, 3, dtype=torch.int64)), "block_tables"),
        (dict(block_tables=torch.zeros(3, 3, dtype=torch.int32)), "block_tables"),
        (dict(lengths=torch.zeros(2, 1, dtype=torch.int32)), "lengths"),
        (dict(lengths=torch.tensor([49, 1], dtype=torch.int32)), "lengths: 49"),
        (dict(lengths=torch.zeros(2, dtype=torch.int32, device="meta")), "lengths"),
        (dict(sinks=torch.zeros(2)), "sinks"),
        (dict(scale=0.0), "scale=0.0"),
        (dict(softcap=0.0), "softcap=0.0"),
        (dict(window=0), "window=0"),
        (dict(backend="flash"), "backend='flash'"),
    ],
)
def test_bad_input_is_named(change, message):
    good = dict(
        query=torch.zeros(2, 6, 40),
        key_cache=torch.zeros(9, 16, 2, 40),
        value_cache=torch.zeros(9, 16, 2, 24),
        block_tables=torch.zeros(2, 3, dtype=torch.int32),
        lengths=torch.ones(2, dtype=torch.int32),
        scale=0.2,
    )
    with pytest.raises(ValueError, match=message):
        paged_attention(**(good | change))
