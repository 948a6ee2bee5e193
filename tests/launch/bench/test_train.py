"""`gearshift bench train`: that its sides do the work they are named after. No timing."""

import argparse
import json

import pytest
import torch

from gearshift.launch.bench import train as bench
from tests.tiny import run as tiny_run

SIZES = [
    "--shape",
    "qwen2.5-0.5b",
    "--vocab",
    "64",
    "--layers",
    "1",
    "--rows",
    "8",
    "--tokens",
    "24",
]
SIZES += ["--prompt", "8", "--response", "8", "--repeats", "1", "--deepspeed", "trained_zero0.json"]


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*SIZES, *words])


@pytest.mark.parametrize(("kind", "mean"), [("even", 0.62), ("skewed", 0.24), ("full", 1.0)])
def test_lengths(kind, mean):
    lengths = bench.lengths_of(kind, 4000, 400, torch.Generator().manual_seed(0))
    assert lengths.max() <= 400 and lengths.min() >= 1
    assert float(lengths.float().mean()) / 400 == pytest.approx(mean, abs=0.02)


def test_the_share_of_time_that_any_span_covers():
    assert bench.busy_share(iter([(0, 2), (1, 3), (5, 6)])) == (3, 4 / 6)
    assert bench.busy_share(iter([])) == (0, 0.0)


@pytest.fixture(scope="module")
def alone():
    with tiny_run.alone():
        yield


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_every_side_has_the_same_gradients(alone, role):
    """The peers' losses are the same sum, so that all sides compute one thing."""
    device, args = torch.device("cpu"), parse("--role", role)
    rows = bench.make_rows(args, 64, device)
    weights = rows.response_mask / rows.response_mask.sum()
    found = []
    for attn, loss in (("auto", bench.role_loss), ("sdpa", bench.plain_loss)):
        made = bench.build(args, device, attn, "never")
        if role == "critic":
            torch.nn.init.normal_(made.model.score.weight, generator=torch.manual_seed(1))
            made.ppo = bench.PPOConfig(value_clip=None)
        made.backward(loss(made, rows, weights), last=True)
        found.append(torch.cat([p.grad.flatten() for p in made.engine.module.parameters()]))
    ours, theirs = found
    most = float(ours.abs().max())
    assert most > 1e-4
    # Sums of a few hundred float32 terms in another order.
    torch.testing.assert_close(ours, theirs, atol=300 * 2.0**-24 * most, rtol=0)


def test_figures_are_written(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(bench.distributed, "stop", lambda: None)
    file = tmp_path / "figures.json"
    assert bench.main(parse("--json", str(file))) == 0
    side = json.loads(file.read_text())["sides"]["gearshift"]
    assert side["live_tokens"] > 8 and side["micro_batches"] > 1 and side["launches"] is None
