"""Where the log-prob difference between generation and training comes from, layer by layer.

A model answers prompts in the generation gear; the training gear then reads the same tokens end to
end, and so does a copy of the weights in a wider dtype: the truth. Each layer's output is compared
at every response token, relative to the truth: the error of either gear, and of one against the
other. Gears that round independently differ by the root of the sum of both errors' squares,
`expected`; what differs by more has another cause than rounded products.

  gearshift bench mismatch --shape qwen2.5-0.5b --layers 4 --dtype bfloat16
"""

import argparse
import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gearshift.engine.attention import packed
from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.models.heads import HeadOptions
from gearshift.engine.models.reading import hidden_states, lay_out
from gearshift.engine.models.shapes import PREFIX
from gearshift.engine.rollout import engine as rollout_engine
from gearshift.engine.rollout.graphs import has_experts
from gearshift.engine.zero.layers import decoder_layers
from gearshift.kernels import ops
from gearshift.launch.bench.job import check_counts
from gearshift.launch.bench.record import machine, write_json
from gearshift.launch.bench.table import show
from gearshift.launch.bench.workload import load, make_engine, make_workload

WIDER = {"float32": torch.float64, "bfloat16": torch.float32, "float16": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="directory, .gguf file or asset:NAME")
    add("--shape", default="qwen2.5-0.5b", help="or a published architecture, of random weights")
    add("--layers", type=int, default=0, help="of --shape; 0: all")
    add("--vocab", type=int, default=0, help="of --shape; 0: its own")
    add("--dtype", default="bfloat16", choices=sorted(WIDER), help="of both gears")
    add("--batch", type=int, default=16, help="prompts")
    add("--prompt", type=int, default=64, help="longest prompt; the shortest is an eighth of it")
    add("--new", type=int, default=64, help="longest response")
    add("--json", type=Path, help="also write the figures to this file")
    parser.set_defaults(ragged=True, shortest=0)


@dataclass(frozen=True, kw_only=True)
class Gear:
    """What one way of reading made of the response tokens, in their order.

    layers: by name, [N, H] each: what the layers and the last norm put out. logprobs: [N].
    """

    layers: dict[str, Tensor]
    logprobs: Tensor


def main(args: argparse.Namespace) -> int:
    check_counts(args, "batch", "prompt", "new")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distributed.forbid_cudnn_attention()
    torch.manual_seed(0)
    path, sizes = args.model or f"{PREFIX}{args.shape}", (args.layers, args.vocab)
    model = load(path, getattr(torch, args.dtype), device, *sizes).eval()
    figures = compare(*read(args, model, device))
    report(args, figures)
    write_json(args.json, {"machine": machine(device), "arguments": vars(args)} | figures)
    return 0


@torch.no_grad()
def read(args: argparse.Namespace, model: nn.Module, device: torch.device) -> tuple[Gear, ...]:
    """(generation, training, the truth, training's head on what generation put into its own)."""
    work = make_workload(args, model.config.get_text_config().vocab_size)
    config = RolloutConfig(max_sequences=args.batch, cuda_graphs=False)  # hooks see no replay
    engine = make_engine(model, config, device)
    seeds = list(range(args.batch))
    with captured(model) as outputs, packs() as laid:
        made = engine.generate(
            work.prompts, SamplingConfig(max_new_tokens=args.new), seeds, limits=work.limits
        )
    engine.release()
    rows = [prompt + one.token_ids for prompt, one in zip(work.prompts, made, strict=True)]
    starts = [len(prompt) for prompt in work.prompts]
    logprobs = torch.tensor([value for one in made for value in one.logprobs], device=device)
    generation = Gear(layers=_gathered(outputs, laid, rows, starts), logprobs=logprobs)
    packed.adopt(model)
    training = trained(model, rows, starts, device)
    wide = copy.deepcopy(model).to(WIDER[args.dtype])
    if has_experts(model.config.get_text_config()):
        wide.set_experts_implementation("eager")  # grouped products know no float64
    truth = trained(wide, rows, starts, device)
    last = list(generation.layers.values())[-1].to(device)
    logprobs = head_logprobs(model, last, _targets(rows, starts, device))
    return generation, training, truth, Gear(layers={}, logprobs=logprobs)


@contextmanager
def captured(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The outputs of the decoder layers and the last norm, forward by forward, [tokens, H] each."""
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    layers = decoder_layers(model)
    parts = {f"layer {number}": layer for number, layer in enumerate(layers)}
    norms = [part for part in model.base_model.children() if "norm" in type(part).__name__.lower()]
    parts |= {"norm": norms[-1]} if norms else {}

    def keep(name: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs[name].append(hidden.detach().flatten(0, -2).cpu())

    with ExitStack() as stack:
        for name, part in parts.items():
            hook = part.register_forward_hook(lambda m, i, out, name=name: keep(name, out))
            stack.callback(hook.remove)
        yield outputs


@contextmanager
def packs() -> Iterator[list[list[tuple[int, int]]]]:
    """Of every forward of a rollout engine the (sequence, position) of each of its tokens."""
    laid: list[list[tuple[int, int]]] = []
    pack = rollout_engine.pack

    def noted(batch: Any, *rest: Any) -> Any:
        places = [(s.index, s.cached) for s in batch.decode]
        for s, count in batch.prefill:
            places += [(s.index, s.cached + i) for i in range(count)]
        laid.append(places)
        return pack(batch, *rest)

    with mock.patch.object(rollout_engine, "pack", noted):
        yield laid


def _gathered(
    outputs: dict[str, list[Tensor]],
    laid: list[list[tuple[int, int]]],
    rows: list[list[int]],
    starts: list[int],
) -> dict[str, Tensor]:
    """What predicted the response tokens, in their order."""
    wanted = [(i, p - 1) for i, s in enumerate(starts) for p in range(s, len(rows[i]))]
    places = {place: n for n, place in enumerate(p for forward in laid for p in forward)}
    index = torch.tensor([places[place] for place in wanted])
    # The forward that looks for each layer's shapes, of one token, comes before all others.
    return {name: torch.cat(parts[-len(laid) :])[index] for name, parts in outputs.items()}


def trained(
    model: nn.Module, rows: list[list[int]], starts: list[int], device: torch.device
) -> Gear:
    """The rows end to end, as training reads them."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    reading, places = lay_out(ids.to(device), mask.to(device), packs=True)
    before = torch.arange(ids.shape[1]) + 1
    predicts = (before >= torch.tensor(starts)[:, None]) & (before < lengths[:, None])
    index = places[predicts.to(device)]
    with captured(model) as outputs:
        hidden = hidden_states(model, reading, index)
    layers = {name: parts[0][index.cpu()] for name, parts in outputs.items()}
    return Gear(
        layers=layers, logprobs=head_logprobs(model, hidden, _targets(rows, starts, device))
    )


def _targets(rows: list[list[int]], starts: list[int], device: torch.device) -> Tensor:
    tokens = [token for row, start in zip(rows, starts, strict=True) for token in row[start:]]
    return torch.tensor(tokens, device=device)


def head_logprobs(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N] log-probs by training's head; of a float64 model by plain PyTorch."""
    head, options = model.get_output_embeddings(), HeadOptions.of(model.config)
    if hidden.dtype != torch.float64:
        bias = getattr(head, "bias", None)
        return ops.linear_logprob(hidden, head.weight, targets, bias=bias, **vars(options))[0]
    logits = head(hidden) * options.logit_scale
    if options.logit_softcap is not None:
        logits = options.logit_softcap * (logits / options.logit_softcap).tanh()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def compare(generation: Gear, training: Gear, truth: Gear, head: Gear) -> dict[str, Any]:
    """Relative errors of each layer, and mean and largest differences of log-probs in nats."""
    rows = []
    for name, true in truth.layers.items():
        sides = {"generation": generation.layers[name], "training": training.layers[name]}
        norm = true.double().norm()
        errors = {s: float((x.double() - true.double()).norm() / norm) for s, x in sides.items()}
        between = (sides["generation"].double() - sides["training"].double()).norm() / norm
        expected = (errors["generation"] ** 2 + errors["training"] ** 2) ** 0.5
        rows.append({"layer": name, **errors, "between": float(between), "expected": expected})
    pairs = {
        "generation - training": (generation, training),
        "of it by the head": (generation, head),
        "of it by hidden states": (head, training),
        "generation - truth": (generation, truth),
        "training - truth": (training, truth),
    }
    nats = {}
    for name, (one, other) in pairs.items():
        off = (one.logprobs.double() - other.logprobs.double()).abs()
        nats[name] = {"mean": float(off.mean()), "largest": float(off.max())}
    return {"tokens": len(truth.logprobs), "layers": rows, "logprobs": nats}


def report(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Two tables: the layers, and the log-probs."""
    columns = ["layer", "generation", "training", "between", "expected"]
    rows = [[row["layer"], *(f"{row[c]:.2e}" for c in columns[1:])] for row in figures["layers"]]
    what = args.model or f"{args.shape}, {args.layers or 'all'} layers"
    title = f"{what}, {args.dtype}: error of the hidden states of {figures['tokens']} tokens"
    show(title, columns, rows, [], left=1)
    nats = [
        [name, f"{value['mean']:.2e}", f"{value['largest']:.2e}"]
        for name, value in figures["logprobs"].items()
    ]
    show("log-probs, nats", ["difference", "mean", "largest"], nats, [], left=1)
