"""`gearshift bench generation`: what every side is asked for, and the figures. No timing."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from gearshift.launch import bench_generation as bench
from tests import tiny


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
    lm, work = bench.load(args.model, bench.torch.float32).eval(), bench.make_workload(args, 32)
    assert work.limits[0] == max(work.limits) == 9 and len(set(work.limits)) > 2
    lengths = []
    hook = lm.register_forward_hook(lambda m, a, out: lengths.append(out.logits.shape[0]))
    bench.generate_run(lm, work)
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


def test_partitioned_peers_need_ranks(model):
    with pytest.raises(ValueError, match="--peers zero3: needs --ranks of at least 2"):
        bench.main(parse("--model", model, "--peers", "zero3"))


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
