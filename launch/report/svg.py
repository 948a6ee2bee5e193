"""Charts as inline SVG: no script, no request; colours come from the page's style sheet."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from gearshift.launch.report.data import Point

_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 8.0, 8.0, 24.0  # room around a drawing


@dataclass(frozen=True)
class Curve:
    """One line of a chart, with a shaded band where `points` or `band` has one."""

    label: str
    points: list[Point | None]
    band: list[tuple[float, float] | None]
    sparse: bool = False  # points are marked, and joined over the steps between them


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; `log` maps their base-10 logarithm."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    log: bool = False

    def at(self, value: float) -> float:
        scaled = math.log10(max(value, 1e-300)) if self.log else value
        share = (scaled - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high, most)
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        if last - first < 2:  # too few powers of ten to read a value by
            near = [m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 2, 5)]
            return [tick for tick in near if self.low <= math.log10(tick) <= self.high]
        every = math.ceil((last - first + 1) / most)
        return [10.0**power for power in range(first, last + 1, every)]


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high]: at most `most`, if over two."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [i * width for i in range(first, last + 1)]


def short(value: float, digits: int = 4) -> str:
    """A number in at most about seven characters."""
    size = abs(value)
    if size == 0:
        return "0"
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            scale = 1e3 if suffix == "k" else factor
            return f"{value / scale:.3g}{suffix}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.{digits}g}"


def line_chart(
    title: str, steps: list[str], curves: list[Curve], *, log: bool = False, percent: bool = False
) -> Markup:
    """Curves over the groups of steps named by `steps`; hovering a group shows its values."""
    width, height = 330.0, 186.0
    y = _value_axis(curves, height, log)
    x = Axis(-0.5, max(len(steps) - 0.5, 0.5), _LEFT, width - _RIGHT)
    label = _percent if percent else short
    body = [_grid(y, width, [label(t) for t in y.ticks(5)]), _step_labels(steps, x, height)]
    body += [_band(curve, i, x, y) for i, curve in enumerate(curves)]
    body += [_line(curve, i, x, y) for i, curve in enumerate(curves)]
    body += [_hover(curves, i, step, x, y, label) for i, step in enumerate(steps)]
    return _svg(title, width, height, "".join(body))


def stacked_bars(title: str, steps: list[str], layers: list[tuple[str, list[float]]]) -> Markup:
    """One bar per group of steps, made of the layers (label, seconds per group) from below."""
    width, height = 1240.0, 270.0
    tops = [math.fsum(values[i] for _, values in layers) for i in range(len(steps))]
    y = Axis(0.0, max(tops) * 1.05 or 1.0, height - _BOTTOM, _TOP)
    x = Axis(-0.5, len(steps) - 0.5, _LEFT, width - _RIGHT)
    pitch = (width - _LEFT - _RIGHT) / len(steps)
    bar = min(pitch * 0.86, 48.0)
    body = [_grid(y, width, [f"{short(t)} s" for t in y.ticks(6)]), _step_labels(steps, x, height)]
    for i, step in enumerate(steps):
        below, parts = 0.0, []
        for layer, (_, values) in enumerate(layers):
            top = y.at(below + values[i])
            parts.append(
                f'<rect class="fill{layer % 12}" x="{x.at(i) - bar / 2:.1f}" y="{top:.1f}" '
                f'width="{bar:.1f}" height="{max(y.at(below) - top, 0):.1f}"/>'
            )
            below += values[i]
        lines = [f"{name} {values[i]:.2f} s" for name, values in layers if values[i] > 0]
        text = "\n".join([f"step {step}: {tops[i]:.2f} s", *lines])
        body.append(f'<g class="bar"><title>{escape(text)}</title>{"".join(parts)}</g>')
    return _svg(title, width, height, "".join(body))


def _value_axis(curves: list[Curve], height: float, log: bool) -> Axis:
    values = [v for c in curves for p in c.points if p for v in (p.low, p.high)]
    values += [v for c in curves for pair in c.band if pair for v in pair]
    log = log and all(value > 0 for value in values)
    if log:
        values = [math.log10(value) for value in values]
    low, high = min(values), max(values)
    flat = high - low <= 1e-9 * max(abs(low), abs(high))
    room = (abs(high) * 0.1 or 1.0) if flat else (high - low) * 0.07
    # A quantity that is never negative is not shown below zero.
    floor = 0.0 if low >= 0 and not log else -math.inf
    return Axis(max(low - room, floor), high + room, height - _BOTTOM, _TOP, log)


def _grid(y: Axis, width: float, labels: list[str]) -> str:
    parts = []
    for tick, label in zip(y.ticks(6 if width > 500 else 5), labels, strict=True):
        at, kind = y.at(tick), "zero" if tick == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">'
            f"{escape(label)}</text>"
        )
    return "".join(parts)


def _step_labels(steps: list[str], x: Axis, height: float) -> str:
    """Round step numbers, each under its group; the first step too where there is room."""
    firsts = [int(name.split("–")[0]) for name in steps]
    last = int(steps[-1].split("–")[-1])
    round_steps = nice_ticks(firsts[0], last, 6) if last > firsts[0] else []
    labels = {bisect_right(firsts, tick) - 1: int(tick) for tick in round_steps if tick % 1 == 0}
    if not labels or x.at(min(labels)) - x.at(0) > 30:
        labels[0] = firsts[0]
    parts = []
    for i, step in labels.items():
        middle = min(x.at(i), x.end + _RIGHT - 3.4 * len(str(step)))  # half a digit is 3.4 wide
        place = f'x="{middle:.1f}" y="{height - 6}" text-anchor="middle"'
        parts.append(f'<text class="tick" {place}>{step}</text>')
    return "".join(parts)


def _band(curve: Curve, colour: int, x: Axis, y: Axis) -> str:
    parts = []
    for run in _runs([i for i, pair in enumerate(curve.band) if pair]):
        upper = [f"{x.at(i):.1f},{y.at(curve.band[i][1]):.1f}" for i in run]
        lower = [f"{x.at(i):.1f},{y.at(curve.band[i][0]):.1f}" for i in reversed(run)]
        parts.append(f'<polygon class="band fill{colour}" points="{" ".join(upper + lower)}"/>')
    return "".join(parts)


def _line(curve: Curve, colour: int, x: Axis, y: Axis) -> str:
    parts = []
    known = [i for i, point in enumerate(curve.points) if point]
    for run in [known] if curve.sparse else _runs(known):
        at = [(x.at(i), y.at(curve.points[i].mean)) for i in run]
        if curve.sparse or len(at) == 1:
            parts += [
                f'<circle class="fill{colour}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in at
            ]
        if len(at) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in at)
            parts.append(f'<polyline class="line stroke{colour}" points="{path}"/>')
    return "".join(parts)


def _hover(curves: list[Curve], i: int, step: str, x: Axis, y: Axis, label) -> str:
    """A strip that, under the pointer, shows a guide, dots and the values."""
    known = [(n, curve) for n, curve in enumerate(curves) if curve.points[i]]
    if not known:
        return ""
    lines = [f"{curve.label} {label(curve.points[i].mean)}" for _, curve in known]
    dots = "".join(
        f'<circle class="fill{n}" cx="{x.at(i):.1f}" cy="{y.at(c.points[i].mean):.1f}" r="3.5"/>'
        for n, c in known
    )
    half = (x.at(1) - x.at(0)) / 2
    title = escape("\n".join([f"step {step}", *lines]))
    return (
        f'<g class="hit"><title>{title}</title><rect x="{x.at(i) - half:.1f}" y="{_TOP}" '
        f'width="{2 * half:.1f}" height="{y.start - _TOP:.1f}"/><line x1="{x.at(i):.1f}" '
        f'x2="{x.at(i):.1f}" y1="{_TOP}" y2="{y.start:.1f}"/>{dots}</g>'
    )


def _runs(indices: list[int]) -> list[list[int]]:
    """Consecutive indices together: a gap in the data is a gap in the line."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _percent(value: float) -> str:
    return f"{short(100 * value)}%"


def _svg(title: str, width: float, height: float, body: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg>"
    )
