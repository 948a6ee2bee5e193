"""What of the CUDA graphs can be shown without a GPU: buckets, padding, the body they capture."""

from unittest import mock

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gearshift.engine.attention import paged
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.graphs import DecodeGraphs, buckets, cannot_capture
from tests.tiny.rollout import build, make_prompts

PROMPTS = make_prompts([9, 21, 4, 1, 30, 13, 16, 17, 2, 8, 25, 12])
SEEDS, EOS = list(range(12)), [2, 11, 12, 13]
SAMPLING = SamplingConfig(max_new_tokens=20)


def test_buckets_grow_by_doubling_then_by_steps():
    assert buckets(1) == [1] and buckets(3) == [1, 2, 4] and buckets(9) == [1, 2, 4, 8, 16]
    assert buckets(32)[-2:] == [16, 32]
    assert buckets(40) == [1, 2, 4, 8, 16, 32, 48]


def test_graphs_that_are_thrown_away_are_few():
    assert buckets(1, coarse=True) == buckets(16, coarse=True) == [16]
    assert buckets(33, coarse=True) == [16, 64]
    assert buckets(256, coarse=True) == [16, 64, 128, 192, 256]


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GptOss"])
def test_padded_steps_draw_the_same_tokens(family):
    model = build(family)
    config = RolloutConfig(block_size=4, max_sequences=7)
    eager = RolloutEngine(model, config, eos_token_ids=EOS, pad_token_id=0)
    padded = RolloutEngine(model, config, eos_token_ids=EOS, pad_token_id=0)
    padded._use_graphs = padded._keeps = True  # more buckets than where they are thrown away
    expected = eager.generate(PROMPTS, SAMPLING, SEEDS)
    for _ in range(2):  # the second call finds its buffers made
        completions = padded.generate(PROMPTS, SAMPLING, SEEDS)
        assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
        assert padded._graphs is not None and len(padded._graphs._replays) > 1
        for ours, theirs in zip(completions, expected, strict=True):
            ours, theirs = torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


class Letters:
    """A tokenizer whose text is one letter a token."""

    def decode(self, ids, **_):
        return "".join(chr(97 + i % 5) for i in ids)


@pytest.mark.parametrize("stop", [[], ["abc", "dd"]], ids=["by length", "by stop strings"])
def test_a_long_burst_gives_what_single_steps_give(stop):
    """Longer than what a burst keeps at first; rows end apart, and some wait for a place."""
    model, own = build("Llama", num_hidden_layers=2), {"eos_token_ids": [-1], "pad_token_id": 0}
    sampling = SamplingConfig(max_new_tokens=100, stop=stop)
    limits = [100, 99, 70, 3, 1, 80, 66, 65, 64, 2, 90, 100]
    engines = [
        RolloutEngine(
            model, RolloutConfig(block_size=4, max_sequences=n), tokenizer=Letters(), **own
        )
        for n in (12, 12, 5)
    ]
    for engine in engines[1:]:
        engine._use_graphs = True
    expected, *found = (e.generate(PROMPTS, sampling, SEEDS, limits=limits) for e in engines)
    assert any(c.finished for c in expected) == bool(stop)
    for completions in found:
        assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
        assert [c.finished for c in completions] == [c.finished for c in expected]
        assert [len(c.logprobs) for c in completions] == [len(c.token_ids) for c in completions]


def with_graphs(places: int, keeps: bool = False) -> RolloutEngine:
    """Responses end at their limits. keeps: more buckets than where graphs are thrown away."""
    model, config = (
        build("Llama", num_hidden_layers=2),
        RolloutConfig(block_size=4, max_sequences=places),
    )
    engine = RolloutEngine(model, config, eos_token_ids=[-1], pad_token_id=0)
    engine._use_graphs, engine._keeps = True, keeps
    return engine


def test_draws_reach_the_host_in_one_piece_whatever_the_rows():
    """CUDA copies what has gaps by way of unpinned memory, and waits for the device."""
    engine = with_graphs(12, keeps=True)  # whose buckets are narrower than the buffer
    limits = [20, *range(8, 19)]
    widths: set[int] = set()
    launch, copy = DecodeGraphs.launch, torch.Tensor.copy_

    def watched(graphs):
        def copied(target, *given, **how):
            assert target.is_contiguous()
            return copy(target, *given, **how)

        with mock.patch.object(torch.Tensor, "copy_", copied):
            drawn = launch(graphs)
        widths.add(graphs._bucket)
        return drawn

    with mock.patch.object(DecodeGraphs, "launch", watched):
        made = engine.generate(PROMPTS, SAMPLING, SEEDS, limits=limits)
    assert [len(c.token_ids) for c in made] == limits and widths == {1, 2, 4, 8, 16}


def test_places_of_a_burst_are_taken_together():
    """An end would else cost all others a forward without a graph."""
    engine = with_graphs(32)
    prompts = make_prompts([5] * 48)
    limits = [10 + i for i in range(32)] + [40] * 16
    with mock.patch.object(engine, "_forward", wraps=engine._forward) as forward:
        made = engine.generate(
            prompts, SamplingConfig(max_new_tokens=40), [*range(48)], limits=limits
        )
    assert [len(c.token_ids) for c in made] == limits
    # Two places at a time, where 16 ends would each have made one.
    assert forward.call_count <= 1 + 16 / 2


def test_other_settings_or_longer_sequences_need_other_graphs():
    model = build("Llama", num_hidden_layers=2)
    config = RolloutConfig(block_size=4, max_sequences=4)
    engine = RolloutEngine(model, config, eos_token_ids=EOS, pad_token_id=0)
    engine._use_graphs = True
    engine.generate(PROMPTS, SAMPLING, SEEDS)
    graphs = engine._graphs
    assert graphs.fits(SAMPLING, 4, graphs.width) and graphs.fits(SAMPLING, 2, 1)
    assert not graphs.fits(SAMPLING, 5, 1) and not graphs.fits(SAMPLING, 4, graphs.width + 1)
    assert not graphs.fits(SamplingConfig(max_new_tokens=20, temperature=0.5), 4, 1)
    engine.release()
    assert engine._graphs is None


def test_padding_rows_touch_the_dummy_block_alone():
    model = build("Llama", num_hidden_layers=2)
    config = RolloutConfig(block_size=4, max_sequences=3)
    engine = RolloutEngine(model, config, eos_token_ids=EOS, pad_token_id=0)
    engine.generate(PROMPTS[:3], SAMPLING, SEEDS[:3])
    cache = engine._cache
    graphs = DecodeGraphs(model, cache, SAMPLING, None, rows=3, width=2)
    graphs._numbers[:, :4] = torch.tensor([5, 0, 0, 1, 0])[:, None]
    graphs._tables.fill_(cache.dummy_block)
    before = {layer: kept.key.clone() for layer, kept in cache.layers.items()}
    with torch.no_grad(), paged.attending(model):
        graphs._forward(4)
    for layer, kept in cache.layers.items():
        assert torch.equal(kept.key[:-1], before[layer][:-1])
        assert not torch.equal(kept.key[-1], before[layer][-1])


def test_rows_that_ended_count_no_further_than_the_positions_there_are():
    """They stay in a burst while others go on; a model may look its positions up."""
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
    prompts, limits = make_prompts([28] + [2] * 14), [20] + [5] * 7 + [20] * 7
    outputs = []
    for graphs in (False, True):
        config = RolloutConfig(block_size=4, max_sequences=8)
        engine = RolloutEngine(model, config, eos_token_ids=[999], pad_token_id=0)
        engine._use_graphs = graphs
        made = engine.generate(prompts, SAMPLING, list(range(15)), limits=limits)
        outputs.append([c.token_ids for c in made])
    assert outputs[0] == outputs[1] and [len(ids) for ids in outputs[0]] == limits


def test_experts_that_read_their_routing_on_the_host_are_not_captured():
    assert cannot_capture(build("Llama")) is None
    model = build("Mixtral")
    model.config._experts_implementation = "eager"
    assert "experts (eager)" in cannot_capture(model)
    model.config._experts_implementation = "batched_mm"
    assert cannot_capture(model) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_steps_draw_the_same_tokens():
    model = build("Llama").cuda()
    outputs = []
    for graphs in (False, True):
        config = RolloutConfig(block_size=4, max_sequences=7, cuda_graphs=graphs)
        engine = RolloutEngine(model, config, eos_token_ids=EOS, pad_token_id=0, device="cuda")
        outputs.append([c.token_ids for c in engine.generate(PROMPTS, SAMPLING, SEEDS)])
    assert outputs[0] == outputs[1]
