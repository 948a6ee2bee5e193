"""`gearshift report RUN_DIR`: curves, samples and timings of a run as one self-contained page.

Writes RUN_DIR/report.html, also while the run trains.
"""

import argparse
import json
import math
import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gearshift.launch import profiler
from gearshift.launch.console import PHASES, printable, prompt_text
from gearshift.launch.report.charts import chart_cards, step_names
from gearshift.launch.report.data import Run, condense, load_run, spans
from gearshift.launch.report.svg import short, stacked_bars

# The page's policy lets a browser fetch nothing, whatever a sample holds.
_JINJA = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
)
_MOST_BARS = 120

# label, dotted key of config.yaml
_HIGHLIGHTS = (
    ("actor", "actor.path"),
    ("critic", "critic.path"),
    ("estimator", "ppo.estimator"),
    ("prompts a step", "ppo.prompts_per_step"),
    ("samples a prompt", "ppo.samples_per_prompt"),
    ("minibatch", "ppo.minibatch_size"),
    ("epochs", "ppo.epochs"),
    ("actor lr", "actor.optimizer.lr"),
    ("critic lr", "critic.optimizer.lr"),
    ("KL coefficient", "ppo.kl_coef"),
    ("KL controller", "ppo.kl_controller"),
    ("clip", "ppo.clip_high"),
    ("new tokens", "sampling.max_new_tokens"),
    ("temperature", "sampling.temperature"),
    ("seed", "run.seed"),
)

# label, metric
_TILES = (
    ("Score", "objective/scores"),
    ("KL to the reference", "objective/kl"),
    ("Response length", "response_length/mean"),
    ("Entropy", "policy/entropy_avg"),
    ("Tokens per second", "throughput/tokens_per_s"),
    ("Seconds a step", "timing_s/step"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder (run.dir)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write; default RUN_DIR/report.html"
    )


def main(args: argparse.Namespace) -> int:
    print(write_report(args.run_dir, args.output))
    return 0


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Writes the report of a run folder and returns its path; ValueError if it is no run folder."""
    target = output or folder / "report.html"
    fresh = target.with_name(target.name + ".tmp")
    fresh.write_text(render(load_run(folder)), encoding="utf-8")
    os.replace(fresh, target)
    return target


def render(run: Run) -> str:
    """The page. It needs no other file and makes no request."""
    last, total = (run.steps or [0])[-1], run.setting("run.steps")
    finished = isinstance(total, int) and last >= total
    facts = dict(run.environment)
    command = facts.pop("command", facts.pop("command_line", ""))
    return _JINJA.get_template("page.html").render(
        name=run.folder.resolve().name,
        finished=finished,
        status="finished" if finished else f"step {last}" + f" of {total}" * isinstance(total, int),
        summary=_summary(run),
        chips=_chips(run),
        tiles=_tiles(run),
        charts=chart_cards(run) if run.metrics else {},
        samples=_samples(run) if run.metrics else [],
        timeline=_timeline(run),
        profiles=_profiles(run.folder),
        memory=_memory(run),
        command=" ".join(map(str, command)) if isinstance(command, list) else command,
        facts=_flat(facts),
        settings=[_setting(line) for line in run.config_text.rstrip().split("\n") if line],
    )


def _chips(run: Run) -> list[tuple[str, Any]]:
    without = () if run.setting("ppo.estimator") == "gae" else ("critic.",)
    chips = [(label, run.setting(key)) for label, key in _HIGHLIGHTS if not key.startswith(without)]
    rewards = run.setting("rewards") or []
    chips += [("reward", reward.get("name")) for reward in rewards if isinstance(reward, dict)]
    return [(label, value) for label, value in chips if value is not None]


def _summary(run: Run) -> str:
    if not run.metrics:
        return "PPO on DeepSpeed. No step has finished yet."
    seconds = [value for value in run.series("timing_s/step") if value is not None]
    taken = f" in {_duration(math.fsum(seconds))}" if seconds else ""
    count = sum(step > 0 for step in run.steps)
    steps = f"{count} step{'s' if count != 1 else ''}"
    episodes = [value for value in run.series("episode") if value is not None]
    seen = f", {episodes[-1]:,.0f} responses" if episodes else ""
    return f"PPO on DeepSpeed: {steps}{taken}{seen}."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, the last value, the first one and its step)"""
    tiles = []
    for label, key in _TILES:
        known = [
            (step, v) for step, v in zip(run.steps, run.series(key), strict=True) if v is not None
        ]
        if known:
            (first_step, first), (last_step, last) = known[0], known[-1]
            several = last_step > first_step
            before = f"{short(first, 3)} at step {first_step}" if several else "one step"
            tiles.append((label, short(last, 3), before))
    return tiles


def _samples(run: Run) -> list[dict[str, Any]]:
    """Of each set of held-out prompts, then of training: those of its first step and of its last,
    side by side; None beyond a step's."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in run.samples:
        sets.setdefault(str(row.get("eval", "")), []).append(row)
    return [_pairs(name, sets[name]) for name in sorted(sets, key=lambda name: not name)]


def _pairs(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    steps = list(dict.fromkeys(rows[i]["step"] for i in (0, -1)))
    columns = [[_sample(row) for row in rows if row["step"] == step] for step in steps]
    return {
        "title": f"Held-out samples: {name}" if name else "Samples",
        "steps": " and ".join(f"step {step}" for step in steps),
        "pairs": list(zip_longest(*columns)),
    }


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    prompt, response, score = (row.get(name, "") for name in ("prompt", "response", "score"))
    return {
        "step": row["step"],
        "score": f"{score:+.3f}" if isinstance(score, (int, float)) else "no score",
        "prompt": prompt_text(prompt),
        "response": f"\n\n{response.lstrip()}" if isinstance(prompt, list) else response,
    }


def _timeline(run: Run) -> dict[str, Any] | None:
    groups = spans(len(run.metrics), _MOST_BARS)
    layers = []
    for key in _in_order(run.keys("timing_s/")):
        points = condense(run.series(key), groups)
        if key != "timing_s/step" and any(point and point.mean for point in points):
            layers.append((key.removeprefix("timing_s/"), [p.mean if p else 0.0 for p in points]))
    if not layers:
        return None
    layers += _untimed(condense(run.series("timing_s/step"), groups), layers)
    sums = {name: math.fsum(values) for name, values in layers}
    total = math.fsum(sums.values())
    return {
        "drawing": stacked_bars("Seconds of each step by phase", step_names(run, groups), layers),
        "shares": [(name, f"{seconds / total:.0%}") for name, seconds in sums.items()],
    }


def _in_order(keys: list[str]) -> list[str]:
    """Phases as a step passes through them, unknown ones last."""
    place = {name: i for i, name in enumerate(PHASES)}
    return sorted(keys, key=lambda key: place.get(key.partition("/")[2], len(place)))


def _untimed(steps: list, layers: list[tuple[str, list[float]]]) -> list[tuple[str, list[float]]]:
    """The part of the steps that no phase covers, where it is worth showing."""
    rest = [
        max(0.0, step.mean - math.fsum(values[i] for _, values in layers)) if step else 0.0
        for i, step in enumerate(steps)
    ]
    whole = math.fsum(step.mean for step in steps if step)
    return [("other", rest)] if math.fsum(rest) > 0.005 * whole else []


def _memory(run: Run) -> dict[str, float]:
    """GB of each phase, the highest of any step."""
    peaks = {}
    for key in _in_order(run.keys("memory_gb/")):
        known = [value for value in run.series(key) if value is not None]
        if known:
            peaks[key.removeprefix("memory_gb/")] = max(known)
    return peaks


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in facts.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name} ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            pairs.append((f"{prefix}{name}", shown))
    return pairs


def _setting(line: str) -> tuple[str, str]:
    """A line of config.yaml: what is set, and its origin, "" where the line sets nothing."""
    body, mark, origin = line.rpartition(" # ")
    return (body, origin) if mark else (line, "")


def _profiles(folder: Path) -> list[dict[str, Any]]:
    """What page.html shows of each profiled step of a run folder: its phases, and their costs."""
    files = sorted((folder / profiler.FOLDER).glob(f"step_*/{profiler.TABLE}"))
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [
        {
            "step": table["step"],
            "phases": profiler.rows(table),
            "costs": {
                f"{phase}: costs on the {kind}": (
                    profiler.COST_COLUMNS,
                    profiler.cost_rows(table, phase, kind),
                )
                for phase, kind in profiler.costly(table)
            },
        }
        for table in tables
    ]
