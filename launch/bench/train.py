"""Times forward and backward of one role: tokens per second, share of the device's rate, launches.

The model of a published shape has random weights and trains by the given DeepSpeed JSON, as in the
main job. Rows are ragged; a micro-batch holds --tokens of them. Peers, in the same run, one after
the other: our own padded way, its rows sorted by length, and plain transformers under DeepSpeed,
whose script pads a fixed number of rows as they come, takes log-softmax of all logits and calls
backward.

  gearshift bench train --shape qwen2.5-7b --layers 8 --tokens 8192 --peers
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gearshift.engine import microbatch
from gearshift.engine.batch import Experience
from gearshift.engine.cluster import distributed
from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import Config, CriticConfig, PPOConfig, TrainedConfig
from gearshift.engine.metrics import peak_memory, reset_peak_memory
from gearshift.engine.models.load import PreTrainedModel, auto_class, prepare
from gearshift.engine.models.shapes import published, shape_of
from gearshift.engine.objective import token_weights
from gearshift.engine.plan.hardware import GPUS
from gearshift.engine.plan.seconds import Work, forward_flops
from gearshift.engine.plan.start import this_machine
from gearshift.engine.roles import Actor, Critic, train_budget
from gearshift.launch.bench import ranks
from gearshift.launch.bench.job import check_counts
from gearshift.launch.bench.record import machine, write_json
from gearshift.launch.bench.table import show
from gearshift.launch.bench.workload import timed
from gearshift.launch.profiler import busy_share

SIDES: dict[str, dict[str, Any]] = {
    "gearshift": {},
    "gearshift, no liger": {"liger": "never"},
    "gearshift, padded": {"liger": "never", "attn": "sdpa"},
    "transformers": {"liger": "never", "attn": "sdpa", "plain": True},
}
WARM_UP = 3  # passes over all micro-batches: kernels compile, the allocator grows


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one pass over the rows, as a median; seconds are wall time.

    useful_tflops: 6 FLOPs per weight and live token, and causal attention (Kaplan et al. 2020);
    what padding costs does not count.
    """

    micro_batches: int
    live_tokens: int
    seconds: float
    tokens_per_s: float
    useful_tflops: float
    mfu: float | None
    launches: int | None  # kernels and copies, a micro-batch
    device_busy: float | None  # share of a profiled pass in which a kernel ran
    peak_gb: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="a published architecture")
    parser.add_argument("--layers", type=int, default=0, help="of them; 0: all")
    parser.add_argument("--vocab", type=int, default=0, help="its vocabulary; 0: the shape's")
    parser.add_argument("--role", choices=("actor", "critic"), default="actor")
    parser.add_argument("--rows", type=int, default=32, help="responses in all")
    parser.add_argument("--prompt", type=int, default=256, help="longest prompt, in tokens")
    parser.add_argument("--response", type=int, default=512, help="longest response, in tokens")
    parser.add_argument(
        "--lengths",
        choices=("even", "skewed", "full"),
        default="even",
        help="even: from a quarter of the longest up; skewed: every eighth row is longest, the "
        "others have up to a quarter, a quarter on average in all; full: all are longest",
    )
    parser.add_argument("--tokens", type=int, default=8192, help="ppo.micro_batch_tokens")
    parser.add_argument("--deepspeed", default="trained_zero1_bf16_split.json", help="JSON")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="also the padded ways")
    parser.add_argument("--side", choices=SIDES, default="gearshift", help="the one to measure")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")


def main(args: argparse.Namespace) -> int:
    """Prints the table. Raises ConfigError for counts that are none."""
    check_counts(args, "rows", "prompt", "response", "tokens", "repeats")
    names = list(SIDES) if args.peers else [args.side]
    if len(names) == 1:
        device = distributed.start()
        rows = make_rows(args, _shape(args).vocab_size, device)
        found = {args.side: asdict(measure(args, rows, device, **SIDES[args.side]))}
        distributed.stop()
    else:
        found = {name: apart(args, name) for name in names}
    report(args, found)
    return 0


def apart(args: argparse.Namespace, side: str) -> dict[str, Any]:
    """Figures of one side from a process of its own: liger-kernel changes classes for good, and
    DeepSpeed keeps memory. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "side.json"
        own = argparse.Namespace(**vars(args) | {"peers": False, "side": side, "json": str(file)})
        status = ranks.start("train", own, launcher=())
        if status:
            raise RuntimeError(f"{side}: ended with status {status}")
        return json.loads(file.read_text())["sides"][side]


def make_rows(args: argparse.Namespace, vocabulary: int, device: torch.device) -> Experience:
    """Random tokens; see --lengths."""
    draw = torch.Generator().manual_seed(0)
    prompts, responses = (
        lengths_of(args.lengths, args.rows, most, draw) for most in (args.prompt, args.response)
    )
    mask = torch.arange(args.response) < responses[:, None]
    ids = torch.randint(3, vocabulary, (args.rows, args.prompt + args.response), generator=draw)
    values = torch.where(mask, torch.randn(mask.shape, generator=draw), 0.0)
    rows = Experience(
        prompt_ids=ids[:, : args.prompt],
        prompt_mask=torch.arange(args.prompt).flip(0) < prompts[:, None],
        row_ids=torch.arange(args.rows),
        columns={},
        response_ids=ids[:, args.prompt :],
        response_mask=mask,
        rollout_logprobs=-values.abs(),
        finished=torch.ones(args.rows, dtype=torch.bool),
        logprobs=-values.abs(),
        ref_logprobs=-values.abs(),
        values=values,
        advantages=values,
        returns=values,
        scores=torch.zeros(args.rows),
    )
    return rows.to(device)


def lengths_of(kind: str, rows: int, most: int, draw: torch.Generator) -> Tensor:
    """[rows] int64, at most `most`."""
    if kind == "full":
        return torch.full((rows,), most)
    if kind == "even":
        return torch.randint(max(1, most // 4), most + 1, (rows,), generator=draw)
    short = torch.randint(1, max(2, most // 4 + 1), (rows,), generator=draw)
    return torch.where(torch.arange(rows) % 8 == 0, most, short)


def measure(
    args: argparse.Namespace,
    rows: Experience,
    device: torch.device,
    *,
    attn: str = "auto",
    liger: str = "auto",
    plain: bool = False,
) -> Figures:
    """One side, from building the model on."""
    role = build(args, device, attn, liger)
    budget = train_budget(role.ppo, [role])
    if plain:  # rows as they come, as many as may be of full length
        micros = list(rows.split(max(1, args.tokens // (args.prompt + args.response))))
    else:
        micros = microbatch.micro_batches(rows, budget)
    loss = plain_loss if plain else role_loss

    def once() -> None:
        for i, micro in enumerate(micros):
            weights = token_weights(
                micro.response_mask, "token_mean", args.rows, rows.response_mask.sum()
            )
            role.backward(loss(role, micro, weights), last=i == len(micros) - 1)
        role.engine.optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize(device)

    on_gpu = device.type == "cuda"
    for _ in range(WARM_UP):
        once()
    reset_peak_memory(device)
    seconds = sorted(timed(once).wall_s for _ in range(args.repeats))[args.repeats // 2]
    launches, busy = profiled(once) if on_gpu else (None, None)
    live = int(rows.attention_mask.sum())
    useful = useful_flops(args, rows) / seconds
    hardware = this_machine(device)
    return Figures(
        micro_batches=len(micros),
        live_tokens=live,
        seconds=seconds,
        tokens_per_s=live / seconds,
        useful_tflops=useful / 1e12,
        mfu=useful / hardware.gpu.flops if hardware.name in GPUS else None,
        launches=launches // len(micros) if launches is not None else None,
        device_busy=busy,
        peak_gb=peak_memory(device) if on_gpu else None,
    )


def build(args: argparse.Namespace, device: torch.device, attn: str, liger: str) -> Any:
    """An Actor or Critic as the main job makes it, of random weights."""
    kind, config = "policy" if args.role == "actor" else "critic", _shape(args)
    settings = ds_config.load(args.deepspeed)
    dtype = torch.bfloat16 if settings.get("bf16", {}).get("enabled") else torch.float32
    common: dict[str, Any] = {"attn": attn, "liger": liger, "deepspeed": args.deepspeed}
    common |= {"gradient_checkpointing": args.recompute, "sleep": "never"}
    own = TrainedConfig(**common) if kind == "policy" else CriticConfig(**common)
    split = settings.get("bf16", {}).get("bf16_master_weights_and_grads")
    own = replace(own, optimizer=replace(own.optimizer, name="split_adamw" if split else "adamw"))
    torch.manual_seed(0)
    config.num_labels = 1
    with device:
        module: PreTrainedModel = auto_class(kind, config).from_config(config, dtype=dtype)
    module = prepare(module, own, kind)
    ppo = PPOConfig(micro_batch_tokens=args.tokens, prompts_per_step=64)
    run = Config(actor=own, ppo=ppo) if kind == "policy" else Config(critic=own, ppo=ppo)
    if kind == "critic":
        return Critic(module, run, settings, 1)
    tokenizer = SimpleNamespace(eos_token_id=2, chat_template=None)
    return Actor(module, tokenizer, run, settings, 1)


def _shape(args: argparse.Namespace) -> Any:
    return published(args.shape, layers=args.layers, vocabulary=args.vocab)


def role_loss(role: Any, micro: Experience, weights: Tensor) -> Tensor:
    """As the trainer computes it."""
    return role.loss(micro, weights)[0]


def plain_loss(role: Any, micro: Experience, weights: Tensor) -> Tensor:
    """As a script would: padded rows, logits of every token, autograd."""
    live = micro.response_mask
    mask = micro.attention_mask
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    role.engine.train()
    logits = role.engine.module.model(
        micro.input_ids, attention_mask=mask, position_ids=positions
    ).logits
    before = logits[:, micro.prompt_ids.shape[1] - 1 : -1]
    if logits.shape[-1] == 1:
        return (weights * (before[..., 0].float() - micro.returns) ** 2)[live].sum() / 2
    table = before.float().log_softmax(-1)
    logprobs = table.gather(2, micro.response_ids[..., None])[..., 0]
    ratio = (logprobs - micro.logprobs).exp()
    clipped = ratio.clamp(1 - role.ppo.clip_low, 1 + role.ppo.clip_high)
    gain = torch.minimum(ratio * micro.advantages, clipped * micro.advantages)
    return -(weights * gain)[live].sum()


def profiled(call: Callable[[], None]) -> tuple[int, float]:
    """(kernels and copies on the device, share of the time from first to last in which one ran)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    return busy_share(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def useful_flops(args: argparse.Namespace, rows: Experience) -> float:
    """Multiplications and additions of forward and backward over live tokens; see Figures."""
    shape = shape_of(_shape(args), "policy" if args.role == "actor" else "critic")
    once = {"rows": 1, "score_pieces": 1, "train_pieces": 1, "epochs": 1, "updates": 1}
    lengths = zip(rows.prompt_mask.sum(1).tolist(), rows.lengths.tolist(), strict=True)
    works = (Work(prompt=prompt, response=response, **once) for prompt, response in lengths)
    return 3 * sum(sum(forward_flops(shape, work)) for work in works)


def report(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """The table, and the JSON file where one was asked for."""
    columns = ["", "micro-batches", "s", "tokens/s", "TFLOP/s", "MFU", "launches", "busy", "GB"]
    lines = [
        [
            name,
            str(f["micro_batches"]),
            f"{f['seconds']:.3f}",
            f"{f['tokens_per_s']:.0f}",
            f"{f['useful_tflops']:.3g}",
            _cell(f["mfu"], "{:.1%}"),
            _cell(f["launches"], "{}"),
            _cell(f["device_busy"], "{:.0%}"),
            _cell(f["peak_gb"], "{:.1f}"),
        ]
        for name, f in found.items()
    ]
    live = next(iter(found.values()))["live_tokens"]
    work = f"{args.role} of {args.shape}, {args.layers or 'all'} layers, {args.rows} rows, "
    title = f"{work}{live} live tokens, forward and backward"
    show(title, columns, lines, [f"{args.deepspeed}, micro_batch_tokens {args.tokens}"], left=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_json(args.json, {"machine": machine(device), "arguments": vars(args), "sides": found})


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
