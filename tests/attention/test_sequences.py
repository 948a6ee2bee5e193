"""Variable-length kernels over the chunks of a batch: what they are called with, and when.

They need a GPU; functions with their published signatures stand in for them, and compute by the
definitions in their documentation.
"""

import math
import sys
from types import ModuleType

import pytest
import torch

from gearshift.engine.attention import sequences
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout.engine import RolloutEngine
from tests.tiny.rollout import build, make_prompts

LENGTHS = [11, 1, 26, 5]
SAMPLING = SamplingConfig(max_new_tokens=6)


def by_definition(q, k, v, cu_q, cu_k, scale, window, softcap=0.0):
    """Query i of a sequence sees keys [i + nk - nq - left, i + nk - nq + right], ends included."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        other = torch.arange(d - c)
        left, right = window
        seen = (other <= place + right) & ((left < 0) | (other >= place - left))
        group = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


@pytest.fixture
def gpu(monkeypatch):
    """Chunks are packed as on a GPU; flash-attn is installed if the test puts it there."""
    monkeypatch.setattr(sequences, "packs", lambda device: True)
    monkeypatch.setattr(sequences, "_half_on_gpu", lambda query: True)
    found = sequences.flash_attn
    found.cache_clear()
    yield monkeypatch
    found.cache_clear()


@pytest.fixture
def flash(gpu):
    calls = []

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
    ):
        assert causal and dropout_p == 0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
        assert max_seqlen_q == max(b - a for a, b in zip(cu_q, cu_q[1:], strict=False))
        assert max_seqlen_k == max(b - a for a, b in zip(cu_k, cu_k[1:], strict=False))
        calls.append((cu_q, cu_k))
        return by_definition(q, k, v, cu_q, cu_k, softmax_scale, (window_size[0], 0), softcap)

    module = ModuleType("flash_attn")
    module.__spec__ = type(sys.__spec__)("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    gpu.setitem(sys.modules, "flash_attn", module)
    return calls


def varlen_spy(calls):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa == (q.shape[1] != k.shape[1]) and cu_q.tolist() == cu_k.tolist()
        assert window_size[1] == 0
        calls.append(cu_q.tolist())
        return by_definition(q, k, v, cu_q.tolist(), cu_k.tolist(), scale, window_size)

    return varlen_attn


@pytest.fixture
def by_torch(gpu):
    calls = []
    spy = varlen_spy(calls)
    gpu.setattr(sequences, "flash_attn", lambda: None)
    gpu.setattr(sequences, "torch_varlen", lambda: spy)
    return calls


def without_a_word(calls, unasked):
    """PyTorch 2.11's has no word for fewer heads of keys than of queries. unasked: whether it
    takes them "right", "wrong" or not at all."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        if q.shape[1] != k.shape[1] and unasked == "refused":
            raise RuntimeError("heads differ")
        calls.append((q.shape[1] != k.shape[1], cu_q.tolist()))
        made = by_definition(q, k, v, cu_q.tolist(), cu_k.tolist(), scale, window_size)
        return made * 1.2 if calls[-1][0] and unasked == "wrong" else made

    return varlen_attn


def generate(model, **options):
    config = RolloutConfig(block_size=4, cuda_graphs=False, **options)
    engine = RolloutEngine(model, config, eos_token_ids=[130_000], pad_token_id=0)
    prompts = make_prompts(LENGTHS)
    return engine.generate([*prompts, prompts[0]], SAMPLING, [3, 1, 4, 1, 5])


def assert_same(ours, theirs):
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    logprobs = (torch.tensor([c.logprobs for c in x]) for x in (ours, theirs))
    torch.testing.assert_close(*logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
@pytest.mark.parametrize("chunk", [8192, 16], ids=["whole", "chunked"])
def test_flash_attn_takes_all_chunks_at_once(family, chunk, request):
    model = build(family, num_hidden_layers=2)
    expected = generate(model, max_batch_tokens=chunk)
    calls = request.getfixturevalue("flash")
    assert_same(generate(model, max_batch_tokens=chunk), expected)
    fresh = [queries == keys for queries, keys in calls]
    assert any(fresh) and all(fresh) == (chunk > 26)  # else the longest prompt has a past
    assert max(len(queries) for queries, _ in calls) > 2


def test_pytorchs_kernel_takes_prompts_without_a_past(request):
    model = build("Mistral", num_hidden_layers=2)
    expected = generate(model)
    calls = request.getfixturevalue("by_torch")
    assert_same(generate(model), expected)
    assert calls == [[0, 11, 37, 42]] * 2  # once per layer; a prompt of one token is decoded


@pytest.mark.parametrize("unasked", ["right", "wrong", "refused"])
def test_keys_are_repeated_only_where_a_kernel_wants_it(unasked, request):
    model = build("Mistral", num_hidden_layers=2)
    expected = generate(model)
    calls = request.getfixturevalue("by_torch")
    kernel = without_a_word(calls, unasked)
    request.getfixturevalue("gpu").setattr(sequences, "torch_varlen", lambda: kernel)
    assert_same(generate(model), expected)
    tried = {"right": [True, False], "wrong": [True, False], "refused": []}[unasked]
    assert [grouped for grouped, _ in calls[: len(tried)]] == tried  # once for the process
    assert calls[len(tried) :] == [(unasked == "right", [0, 11, 37, 42])] * 2


@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
def test_what_a_kernel_cannot_do_goes_chunk_by_chunk(family, request):
    model = build(family, num_hidden_layers=2)
    expected = generate(model)
    calls = request.getfixturevalue("by_torch")
    assert_same(generate(model), expected)
    assert not calls


def test_this_pytorchs_kernel_is_recognised():
    found = sequences.torch_varlen()
    assert found is None or callable(found)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):
        assert found is not None
