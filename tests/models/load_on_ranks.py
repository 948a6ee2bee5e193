"""Run on ranks: loads checkpoints into ZeRO-3 partitions and writes down what came of it.

    torchrun --nproc_per_node W load_on_ranks.py MODELS OUT

OUT/rank<r>.json: anonymous memory of loading MODELS/large. OUT/tables.pt: log-probs by model.
OUT/weights.pt: whole weights of critics. OUT/refusal.txt: what verify_head said of a wrong head.
"""

import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch

from gearshift.engine.checkpoint.export import whole_weights
from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import ModelConfig
from gearshift.engine.models.heads import HeadOptions, Policy, verify_head
from gearshift.engine.models.load import load_model
from gearshift.engine.models.reading import lay_out
from gearshift.engine.roles import frozen_engine


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: mapped checkpoints do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class PeakMemory(threading.Thread):
    """Watches anonymous memory every millisecond until stop()."""

    def __init__(self):
        super().__init__(daemon=True)
        gc.collect()
        self.start_bytes = self.peak = anonymous_bytes()
        self.samples, self._going = 0, True

    def run(self) -> None:
        while self._going:
            self.peak = max(self.peak, anonymous_bytes())
            self.samples += 1
            time.sleep(0.001)

    def stop(self) -> int:
        self._going = False
        self.join()
        return max(self.peak, anonymous_bytes()) - self.start_bytes


def load(path: Path, role: str, **options):
    config = ModelConfig(path=str(path))
    return load_model(config, role, ds_config.load("frozen_zero3"), **options)


def measure(path: Path) -> dict[str, int]:
    watch = PeakMemory()
    watch.start()
    module = load(path, "policy")
    grown = watch.stop()
    held = sum(p.ds_tensor.numel() for p in module.parameters()) * 4
    whole = sum(p.ds_numel for p in module.parameters()) * 4
    return {"grown": grown, "held": held, "whole": whole, "samples": watch.samples}


def logprob_table(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """[B, T, V]: through a real engine, so that hooks gather what ZeRO-3 has cut."""
    engine = frozen_engine(Policy(load(path, "policy")), ds_config.load("frozen_zero3"))
    verify_head(engine)
    reading, places = lay_out(ids, torch.ones_like(ids, dtype=torch.bool), packs=True)
    before = places[:, :-1]

    def head(hidden, weight, bias):
        assert hidden.shape[0] == before.numel() and bias is None
        return (hidden @ weight.T).log_softmax(-1)

    with torch.no_grad():
        table = engine(reading, before.flatten(), head)
    return table.view(*before.shape, -1)


def refusal(path: Path) -> str:
    engine = frozen_engine(Policy(load(path, "policy")), ds_config.load("frozen_zero3"))
    engine.module.options = HeadOptions(logit_scale=0.5)
    try:
        verify_head(engine)
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.start(1)
    load(models / "policy", "policy")  # libraries and buffers that every first load brings
    if (models / "large").exists():
        figures = measure(models / "large")
        (out / f"rank{distributed.rank()}.json").write_text(json.dumps(figures))
    ids = torch.arange(12).view(2, 6)
    tables = {name: logprob_table(models / name, ids) for name in ("policy", "tied", "renamed")}
    sources = {"fresh": ("policy", True), "kept": ("reward", False), "dropped": ("reward", True)}
    weights = {
        name: whole_weights(load(models / source, "critic", fresh_head=fresh))
        for name, (source, fresh) in sources.items()
    }
    said = refusal(models / "policy")
    if distributed.is_main():
        torch.save(tables, out / "tables.pt")
        torch.save(weights, out / "weights.pt")
        (out / "refusal.txt").write_text(said)


if __name__ == "__main__":
    main()
