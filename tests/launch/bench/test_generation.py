"""`gearshift bench generation`: what every side is asked for, and the figures. No timing."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from gearshift.engine.config.schema import RolloutConfig
from gearshift.engine.rollout.engine import RolloutEngine
from gearshift.engine.rollout.graphs import DecodeGraphs
from gearshift.launch.bench import generation as bench
from gearshift.launch.bench import workload
from tests.tiny import models as tiny


def parse(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


SIZES = ("--batch", 6, "--prompt", 16, "--new", 9, "--ragged", "--repeats", 1)


def test_every_side_is_asked_for_the_same_tokens(model, monkeypatch):
    args = parse("--model", model, *SIZES)
    lm, work = (
        workload.load(args.model, bench.torch.float32).eval(),
        workload.make_workload(args, 32),
    )
    assert work.limits[0] == max(work.limits) == 9 and len(set(work.limits)) > 2
    lengths = []
    hook = lm.register_forward_hook(lambda m, a, out: lengths.append(out.logits.shape[0]))
    workload.generate_run(lm, work)
    hook.remove()
    assert lengths == [6] * 9  # one padded batch, until its longest response ends


def test_figures_of_one_process(model, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert bench.main(parse("--model", model, *SIZES, "--peers", "hf", "--json", file)) == 0
    figures = json.loads(file.read_text())
    assert set(figures["sides"]) == {"gearshift", "transformers generate"}
    engine = figures["engine"]
    assert engine["kv_bytes"] > 0 and engine["slots"] == 256 and engine["capture_s"] == 0
    assert min(engine["prefill_tokens_per_s"], engine["decode_tokens_per_s"]) > 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("prefill", "decode", "KV cache"))


LIMITS = [9, 2, 4, 9, 3, 1]


@pytest.fixture(params=[False, True], ids=["eager", "graphs"])
def engine(model, request):
    """Graphs run eagerly here, from the same padded steps: see rollout/test_graphs.py."""
    lm = workload.load(str(model), bench.torch.float32).eval()
    config = RolloutConfig(max_sequences=8)
    made = RolloutEngine(lm, config, eos_token_ids=[workload.NO_TOKEN], pad_token_id=0)
    made._use_graphs = request.param
    return made


def work_of(limits=LIMITS, prompt=5):
    prompts = [[3 + number] * prompt for number in range(len(limits))]
    return workload.Workload(prompts=prompts, limits=list(limits))


def test_decode_steps_are_counted_with_and_without_graphs(engine):
    graphs = engine._use_graphs
    first, then = (bench.measure_engine(engine, work_of()) for _ in range(2))
    assert first.capturing_rounds == (len(engine._graphs._replays) if graphs else 0)
    assert first.decode_steps + first.capturing_rounds <= 8  # those have several steps each
    assert (then.decode_steps, then.capturing_rounds, then.graphs) == (8, 0, graphs)
    tokens = sum(LIMITS) - len(LIMITS)  # each response's first token comes from its prompt
    assert then.decode_tokens_per_s * then.decode_step_ms / 1e3 == pytest.approx(tokens / 8)
    if graphs:
        assert then.outside_forward is None and first.capture_s > 0
        assert "not measured with graphs" in bench.decode_text(then)
        assert f"({first.capturing_rounds} rounds that captured" in bench.decode_text(first)
    else:
        assert 0 < then.outside_forward < 1
        assert bench.decode_text(then).endswith("of it outside the forward")
    assert not engine.module._forward_hooks and "_round" not in vars(engine)


def test_steps_with_prompt_tokens_are_no_decode_steps(engine):
    engine._batch_tokens = 8  # of 30 prompt tokens: four chunks
    rounds = bench.timed_rounds(engine, work_of(prompt=6, limits=[9, 8, 9, 8, 9]))
    assert [played.prefill for played in rounds[:4]] == [True] * 4
    assert sum(played.tokens for played in rounds) == 43
    assert not any(played.prefill for played in rounds[4:])


def test_a_step_is_timed_whole_and_never_inside_a_graph(engine, monkeypatch):
    clock, replaying = [0.0], []
    launch, forward = DecodeGraphs.launch, engine._forward

    def replay(*args):
        clock[0] += 2
        replaying.append(True)
        found = launch(*args)
        replaying.pop()
        return found

    def now():
        assert not replaying
        return clock[0]

    def slow(inputs):
        clock[0] += 100 if inputs.spans else 2
        return forward(inputs)

    monkeypatch.setattr(DecodeGraphs, "launch", replay)
    monkeypatch.setattr(engine, "_forward", slow)
    monkeypatch.setattr(bench, "_now", now)
    bench.measure_engine(engine, work_of())  # captures the graphs
    assert bench.measure_engine(engine, work_of()).decode_step_ms == 2000


def test_without_a_decode_step_nothing_is_told_of_decoding(engine):
    figures = bench.measure_engine(engine, work_of(limits=[1, 1]))
    assert figures.decode_tokens_per_s is figures.decode_step_ms is None
    assert figures.outside_forward is None and figures.decode_steps == 0
    assert bench.decode_text(figures) == "decode not measured"


def test_partitioned_peers_need_ranks(model):
    with pytest.raises(ValueError, match="--peers zero3: needs --ranks of at least 2"):
        bench.main(parse("--model", model, "--peers", "zero3"))


@pytest.mark.slow
def test_figures_of_two_ranks_under_zero3(model, tmp_path):
    file = tmp_path / "figures.json"
    words = ["generation", "--model", model, *SIZES, "--ranks", 2, "--json", file]
    words += ["--peers", "hf", "zero3", "deepspeed"]
    run = subprocess.run(
        [sys.executable, "-m", "gearshift.launch.cli", "bench", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert set(figures["sides"]) == {"gearshift", "generate on ZeRO-3", "HybridEngineRollout"}
    assert figures["ranks"] == 2 and all(s["wall_s"] > 0 for s in figures["sides"].values())
    assert "hf: left out, whole weights on one rank" in run.stdout
