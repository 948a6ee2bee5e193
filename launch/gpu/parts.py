"""The jobs of check.py that no bench does: correctness at real sizes, and ragged gradients."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gearshift.engine.cluster import distributed
from gearshift.kernels.checks.case import Case, Size, verify
from gearshift.kernels.checks.self_check import CASES, SMALL
from gearshift.launch.bench.ops.case import attempt
from gearshift.launch.bench.ops.shapes import SHAPES
from gearshift.launch.bench.record import machine, write_json
from gearshift.launch.bench.table import plain_lines

# Query heads, key-value heads, head size: Llama 3, Qwen2.5 7B, 1.5B and 0.5B, SmolLM2, Llama 2,
# Gemma 2 9B and 2B, one key-value head, Qwen3-32B; 80 and 96 are no powers of two.
HEADS = (
    *((32, 8, 128), (28, 4, 128), (12, 2, 128), (14, 2, 64), (9, 3, 64), (32, 32, 128)),
    *((16, 8, 256), (8, 4, 256), (8, 1, 256), (64, 8, 128), (32, 32, 80), (32, 32, 96)),
)
BEYOND_INT32 = Size(  # rows * vocabulary > 2^31 in one chunk of logits, and in given logits
    rows=17000,
    hidden=256,
    vocab=128256,
    batch=17000,
    response=64,
    heads=(4, 2, 64),
    context=64,
    logits_bytes=1 << 35,
)
LARGE_CACHE = Size(  # keys alone: 2400 * 1024 * 8 * 128 = 2.5e9 elements
    rows=1, hidden=1, vocab=2, batch=2400, response=1, heads=(32, 8, 128), context=1024
)
LARGE_BYTES = 80e9  # of device memory: 32 for each of the 2.2e9 weights of the optimizer's check
HALF_PRECISION = ("linear_logprob", "logprob_entropy", "sample_tokens", "paged_attention")


@dataclasses.dataclass(frozen=True)
class Check:
    """One case at one size."""

    label: str
    case: Case
    size: Size
    dtype: torch.dtype
    backend: str = "triton"


def checks(memory_bytes: float) -> Iterator[Check]:
    """Every op at the sizes of real models, in every dtype it takes, and beyond 32-bit offsets."""
    attention = [case for case in CASES if case.op == "paged_attention"]
    for dtype in (torch.float32, torch.bfloat16):
        yield from (Check("small", case, SMALL, dtype) for case in CASES)
    for case in CASES:
        if case.op in HALF_PRECISION:
            yield Check("small", case, SMALL, torch.float16)
    for name, size in SHAPES.items():
        yield from (Check(name, case, size, torch.bfloat16) for case in CASES)
    name = "qwen2.5-0.5b"
    yield from (Check(name, case, SHAPES[name], torch.bfloat16, "torch") for case in CASES)
    for heads in HEADS:
        size = dataclasses.replace(SMALL, batch=64, heads=heads, context=1000)
        label = "heads {}/{} x {}".format(*heads)
        for dtype in (torch.bfloat16, torch.float32):
            yield from (Check(label, case, size, dtype) for case in attention)
    if memory_bytes < LARGE_BYTES:
        return
    yield from (Check("beyond 2^31", case, BEYOND_INT32, torch.bfloat16) for case in CASES)
    yield from (Check("large cache", case, LARGE_CACHE, torch.bfloat16) for case in attention)


def correctness(wanted: list[Check], device: torch.device, file: Path) -> int:
    """Runs all checks; writes the file after each; prints what failed. 1 if anything did."""
    report: dict[str, Any] = {"machine": machine(device), "checks": []}
    for number, check in enumerate(wanted):
        started = time.perf_counter()
        generator = torch.Generator(device).manual_seed(number)
        found: list[Any] = []
        failure = attempt(
            lambda c=check, g=generator, f=found: f.extend(
                verify(c.case, c.size, c.dtype, g, c.backend)
            )
        )
        errors, problem = found or ({}, None)
        row = {"label": check.label, "case": check.case.name, "backend": check.backend}
        row |= {"dtype": str(check.dtype).removeprefix("torch."), "errors": errors}
        row |= {"problem": failure or problem, "seconds": round(time.perf_counter() - started, 2)}
        report["checks"].append(row)
        write_json(file, report)
    _print_checks(report["checks"])
    return int(any(row["problem"] for row in report["checks"]))


def _print_checks(rows: list[dict[str, Any]]) -> None:
    """A line per label with its worst error, then a line per failure."""
    table = []
    for label in dict.fromkeys(row["label"] for row in rows):
        of_label = [row for row in rows if row["label"] == label]
        failed = sum(bool(row["problem"]) for row in of_label)
        worst = max((error for row in of_label for error in row["errors"].values()), default=0.0)
        seconds = sum(row["seconds"] for row in of_label)
        table.append(
            [label, "FAILED" if failed else "right", f"{failed} of {len(of_label)}"]
            + [f"{worst:.1e}", f"{seconds:.1f}"]
        )
    print("\n".join(plain_lines(["size", "", "failed", "worst error", "s"], table)))
    for row in rows:
        if row["problem"]:
            print(f"{row['label']} {row['case']} {row['dtype']} {row['backend']}: {row['problem']}")


RAGGED = {
    "cuda": ((192, 704, 768, 1024), torch.bfloat16, 0.05),
    "cpu": ((192,), torch.float32, 1e-4),
}
RAGGED_ROWS = 8
_SMALL_MODEL = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
_SMALL_MODEL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_SMALL_MODEL |= {"max_position_embeddings": 1024}


def ragged(device: torch.device, file: Path) -> int:
    """Gradients of ragged rows, padded and end to end; 1 where any is wrong. On Hopper GPUs cuDNN
    attention gave NaN at lengths of 128 k + 64 (cluster/distributed.py)."""
    lengths, dtype, most = RAGGED[device.type]
    rows = [
        {"length": length, "packed": packs, "error": gradient_error(device, dtype, length, packs)}
        for length in lengths
        for packs in (False, True)
    ]
    wrong = [row for row in rows if not row["error"] < most]
    for row in rows:
        way = "end to end" if row["packed"] else "padded"
        verdict = "WRONG" if row in wrong else "right"
        print(f"{row['length']:5} tokens, {way:10}  error {row['error']:.1e}  {verdict}")
    write_json(file, {"machine": machine(device), "dtype": str(dtype), "most": most, "rows": rows})
    return int(bool(wrong))


def gradient_error(device: torch.device, dtype: torch.dtype, length: int, packs: bool) -> float:
    """The largest of any parameter, relative to its norm in float32; NaN where one is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from gearshift.engine.attention import packed

    distributed.forbid_cudnn_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **_SMALL_MODEL)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        truth = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    truth.load_state_dict(model.state_dict())
    if packs:
        packed.adopt(model)
    ids = torch.randint(config.vocab_size, (RAGGED_ROWS, length), device=device)
    mask = torch.ones(RAGGED_ROWS, length, dtype=torch.bool, device=device)
    for row in range(RAGGED_ROWS):
        mask[row, : 7 * row] = False
        mask[row, length - 3 * row :] = False
    mask[0] = True
    found, expected = (_gradients(m, ids, mask) for m in (model, truth))
    assert found.keys() == expected.keys()
    errors = [(found[n] - expected[n]).norm() / expected[n].norm() for n in found]
    return float(torch.stack(errors).amax())  # NaN stays


def _gradients(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss over live positions only."""
    from gearshift.engine.attention import packed
    from gearshift.engine.models.reading import hidden_states, lay_out

    reading, places = lay_out(ids, mask, packs=packed.packs(model))
    hidden_states(model, reading, places[mask]).float().pow(2).mean().backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("gpu_parts", description=__doc__)
    parser.add_argument("job", choices=("correctness", "ragged"))
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.job == "ragged":
        return ragged(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.json)
    device = torch.device("cuda")
    memory = torch.cuda.get_device_properties(device).total_memory
    return correctness(list(checks(memory)), device, args.json)


if __name__ == "__main__":
    sys.exit(main())
