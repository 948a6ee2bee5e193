"""`gearshift report RUN_DIR`: the run as one self-contained page, RUN_DIR/report.html.

page.html is its frame, with the style sheet; what a run fills in is made here.
"""

import argparse
import math
import os
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from gearshift.launch.console import PHASES, printable, prompt_text
from gearshift.launch.report.charts import chart_sections, step_names
from gearshift.launch.report.data import Run, condense, load_run, spans
from gearshift.launch.report.svg import short, stacked_bars

# Its policy lets a browser fetch nothing, whatever a sample holds.
_PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
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
    name = run.folder.resolve().name
    parts = [_header(run, name), _tiles(run)]
    if run.metrics:
        parts += [chart_sections(run), _samples(run), _timeline(run), _memory(run)]
    parts += [_environment(run), _config(run)]
    return _PAGE.substitute(name=_safe(name), body="".join(parts))


def _safe(text: Any) -> str:
    return escape(printable(str(text)))


def _header(run: Run, name: str) -> str:
    chips = [(label, run.setting(key)) for label, key in _HIGHLIGHTS]
    rewards = run.setting("rewards") or []
    chips += [("reward", reward.get("name")) for reward in rewards if isinstance(reward, dict)]
    shown = "".join(
        f'<span class="chip"><b>{_safe(label)}</b>{_safe(value)}</span>'
        for label, value in chips
        if value is not None
    )
    return (
        f'<header><div class="top"><h1>{_safe(name)}</h1>{_status(run)}</div>'
        f'<p>{_summary(run)}</p><div class="chips">{shown}</div></header>'
    )


def _status(run: Run) -> str:
    last, total = (run.steps or [0])[-1], run.setting("run.steps")
    if isinstance(total, int) and last >= total:
        return '<span class="pill done">finished</span>'
    of = f" of {total}" if isinstance(total, int) else ""
    return f'<span class="pill open">step {last}{of}</span>'


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


def _tiles(run: Run) -> str:
    tiles = []
    for label, key in _TILES:
        known = [
            (step, value)
            for step, value in zip(run.steps, run.series(key), strict=True)
            if value is not None
        ]
        if not known:
            continue
        (first_step, first), (last_step, last) = known[0], known[-1]
        before = f"{short(first, 3)} at step {first_step}" if last_step > first_step else "one step"
        tiles.append(
            f'<div class="tile"><span>{label}</span><strong>{short(last, 3)}</strong>'
            f"<small>{before}</small></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _samples(run: Run) -> str:
    """Of each set of held-out prompts, then of training: those of the first step and the last."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in run.samples:
        sets.setdefault(str(row.get("eval", "")), []).append(row)
    return "".join(_sample_pairs(name, sets[name]) for name in sorted(sets, key=lambda n: not n))


def _sample_pairs(name: str, rows: list[dict[str, Any]]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    before = [row for row in rows if row["step"] == first]
    after = [row for row in rows if row["step"] == last] if last != first else []
    pairs = "".join(
        f'<div class="pair">{"".join(_sample(rows, i) for rows in (before, after) if rows)}</div>'
        for i in range(max(len(before), len(after)))
    )
    heading = f"step {first} and step {last}" if after else f"step {first}"
    title = f"Held-out samples: {name}" if name else "Samples"
    return f"<h2>{_safe(title)} <small>{_safe(heading)}</small></h2>{pairs}"


def _sample(rows: list[dict[str, Any]], i: int) -> str:
    if i >= len(rows):
        return "<div></div>"
    row = rows[i]
    score = row.get("score")
    shown = f"{score:+.3f}" if isinstance(score, (int, float)) else "no score"
    chat = isinstance(row.get("prompt"), list)
    response = f"\n\n{row.get('response', '').lstrip()}" if chat else row.get("response", "")
    return (
        f'<section class="card sample"><div class="head"><h3>Step {_safe(row["step"])}</h3>'
        f'<span class="score">{shown}</span></div><div class="text"><span class="prompt">'
        f"{_safe(prompt_text(row.get('prompt', '')))}</span>"
        f"{_safe(response)}</div></section>"
    )


def _timeline(run: Run) -> str:
    groups = spans(len(run.metrics), _MOST_BARS)
    layers = []
    for key in _in_order(run.keys("timing_s/")):
        points = condense(run.series(key), groups)
        if key != "timing_s/step" and any(point and point.mean for point in points):
            layers.append((key.removeprefix("timing_s/"), [p.mean if p else 0.0 for p in points]))
    if not layers:
        return ""
    layers += _untimed(condense(run.series("timing_s/step"), groups), layers)
    total = math.fsum(value for _, values in layers for value in values)
    legend = "".join(
        f'<span><i class="back{i % 12}"></i>{_safe(name)}<b>{math.fsum(values) / total:.0%}</b>'
        "</span>"
        for i, (name, values) in enumerate(layers)
    )
    drawing = stacked_bars("Seconds of each step by phase", step_names(run, groups), layers)
    return (
        "<h2>Where the time goes <small>seconds a step, by phase, of the slowest rank</small></h2>"
        f'<section class="card"><div class="scroll">{drawing}</div>'
        f'<div class="legend">{legend}</div></section>'
    )


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


def _memory(run: Run) -> str:
    peaks = {}
    for key in _in_order(run.keys("memory_gb/")):
        known = [value for value in run.series(key) if value is not None]
        if known:
            peaks[key.removeprefix("memory_gb/")] = max(known)
    if not peaks:
        return ""
    most = max(peaks.values()) or 1.0
    rows = "".join(
        f'<tr><td class="name">{_safe(name)}</td><td><div class="meter back0" '
        f'style="width:{100 * value / most:.1f}%"></div></td>'
        f'<td class="num">{value:.2f} GB</td></tr>'
        for name, value in peaks.items()
    )
    return (
        "<h2>Memory <small>highest of any rank and step, by phase</small></h2>"
        f'<section class="card"><table class="rows">{rows}</table></section>'
    )


def _environment(run: Run) -> str:
    if not run.environment:
        return ""
    facts = dict(run.environment)
    command = facts.pop("command", facts.pop("command_line", ""))
    line = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    shown = f'<pre class="command"><code>{_safe(line)}</code></pre>' if line else ""
    rows = "".join(
        f'<tr><td class="name">{_safe(name)}</td><td class="value">{_safe(value)}</td></tr>'
        for name, value in _flat(facts)
    )
    return (
        f'<h2>Environment</h2><section class="card">{shown}<table class="rows">{rows}</table>'
        "</section>"
    )


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in facts.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name} ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            pairs.append((f"{prefix}{name}", shown))
    return pairs


def _config(run: Run) -> str:
    if not run.config_text:
        return ""
    lines = "\n".join(_config_line(line) for line in run.config_text.rstrip().split("\n"))
    return (
        "<h2>Configuration <small>as resolved; coloured where it is not the default</small></h2>"
        f'<section class="card"><details><summary>config.yaml</summary><pre><code>{lines}</code>'
        "</pre></details></section>"
    )


def _config_line(line: str) -> str:
    body, mark, origin = line.rpartition(" # ")
    if not mark:
        return _safe(line)
    text = _safe(body) if origin.strip() == "default" else f'<span class="set">{_safe(body)}</span>'
    return f'{text}<span class="from">{_safe(mark + origin)}</span>'
