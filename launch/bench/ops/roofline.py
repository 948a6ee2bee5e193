"""The roofline of a bench run as one SVG file: what was reached, under what the machine can do."""

from html import escape
from math import log10

from gearshift.launch.bench.ops.case import Row
from gearshift.launch.bench.ops.timing import Ceiling
from gearshift.launch.report.svg import Axis, short

_WIDTH, _HEIGHT = 900.0, 520.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 230.0, 44.0, 52.0
_STYLE = """
svg { background: #ffffff; font: 12px system-ui, sans-serif; }
text { fill: #3a4754; } .title { font-size: 15px; font-weight: 600; }
.grid { stroke: #e2e6eb; } .roof { stroke: #17202b; stroke-width: 2; fill: none; }
.ours { fill: #3b6fd4; } .peer { fill: none; stroke: #e0772f; stroke-width: 1.5; }
.guide { stroke: #9fb1c4; stroke-dasharray: 2 3; }
@media (prefers-color-scheme: dark) {
  svg { background: #171d24; } text { fill: #c5cfda; } .grid { stroke: #29323c; }
  .roof { stroke: #e6ebf1; } .ours { fill: #79a6ff; } .peer { stroke: #f4a261; }
}
"""


def roofline(rows: list[Row], ceiling: Ceiling, device: str) -> str:
    """Operations per byte against operations per second, both logarithmic; the roof is the copy and
    the matrix product of the same run. Filled: ours, open: peers; hovering shows the figures."""
    timed = [row for row in rows if row.timing]
    x, y = _axes(timed, ceiling)
    parts = [_grid(x, y), _roof(x, y, ceiling), *_labels(timed, x, y)]
    parts += [_point(row, x, y) for row in timed]
    title = f"{device}: {short(ceiling.bytes_per_s / 1e9)} GB/s copied, "
    title += f"{short(ceiling.flops_per_s / 1e12)} TFLOP/s multiplied"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" '
        f'role="img" aria-label="roofline">\n<style>{_STYLE}</style>\n'
        f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>\n'
        f'<text x="{_WIDTH - _RIGHT + 12:g}" y="24">% of the floor; open: peers</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _intensity(row: Row) -> float:
    return row.floor.flops / row.floor.bytes


def _rate(row: Row) -> float:
    return row.floor.flops / (row.timing.median / 1e3)


def _axes(rows: list[Row], ceiling: Ceiling) -> tuple[Axis, Axis]:
    ridge = ceiling.flops_per_s / ceiling.bytes_per_s
    across = [log10(value) for value in [ridge, *map(_intensity, rows)]]
    up = [log10(value) for value in [ceiling.flops_per_s, *map(_rate, rows)]]
    x = Axis(min(across) - 0.4, max(across) + 0.4, _LEFT, _WIDTH - _RIGHT, log=True)
    y = Axis(min(up) - 0.4, max(up) + 0.3, _HEIGHT - _BOTTOM, _TOP, log=True)
    return x, y


def _grid(x: Axis, y: Axis) -> str:
    lines = []
    for tick in x.ticks(8):
        at = f'{x.at(tick):.1f}" '
        lines.append(f'<line class="grid" x1="{at}x2="{at}y1="{y.start}" y2="{y.end}"/>')
        lines.append(f'<text x="{at}y="{y.start + 18}" text-anchor="middle">{short(tick)}</text>')
    for tick in y.ticks(8):
        at = f'{y.at(tick):.1f}" '
        lines.append(f'<line class="grid" y1="{at}y2="{at}x1="{x.start}" x2="{x.end}"/>')
        label = short(tick / 1e12)
        lines.append(f'<text x="{x.start - 8}" y="{at}text-anchor="end">{label}</text>')
    middle = (x.start + x.end) / 2
    lines.append(
        f'<text x="{middle}" y="{y.start + 40}" text-anchor="middle">operations per byte</text>'
        f'<text x="{x.start - 50}" y="{y.end - 8}">TFLOP/s</text>'
    )
    return "\n".join(lines)


def _roof(x: Axis, y: Axis, ceiling: Ceiling) -> str:
    ridge = ceiling.flops_per_s / ceiling.bytes_per_s
    left = 10**x.low
    points = [
        (x.start, y.at(left * ceiling.bytes_per_s)),
        (x.at(ridge), y.at(ceiling.flops_per_s)),
        (x.end, y.at(ceiling.flops_per_s)),
    ]
    if left * ceiling.bytes_per_s < 10**y.low:  # the slope enters from below
        points[0] = (x.at(10**y.low / ceiling.bytes_per_s), y.start)
    path = " ".join(f"{across:.1f},{up:.1f}" for across, up in points)
    return f'<polyline class="roof" points="{path}"/>'


def _point(row: Row, x: Axis, y: Axis) -> str:
    place = f'cx="{x.at(_intensity(row)):.1f}" cy="{y.at(_rate(row)):.1f}"'
    label = f"{row.shape} {row.case}, {row.side}: {row.timing.median:.3g} ms, "
    label += f"{row.share:.0%} of the floor"
    kind, radius = ("ours", 4.5) if row.ours else ("peer", 4)
    return f'<circle class="{kind}" {place} r="{radius}"><title>{escape(label)}</title></circle>'


def _labels(rows: list[Row], x: Axis, y: Axis) -> list[str]:
    """Names of our points in a column at the right, in the points' order from above, each joined to
    its point: near the points they would lie on one another."""
    ours = sorted((row for row in rows if row.ours), key=_rate, reverse=True)
    step = min(18.0, (y.start - y.end) / max(1, len(ours)))
    parts = []
    for number, row in enumerate(ours):
        up = y.end + 6 + number * step
        text = f"{row.case} {row.share:.0%}"
        parts.append(
            f'<line class="guide" x1="{x.at(_intensity(row)):.1f}" y1="{y.at(_rate(row)):.1f}" '
            f'x2="{x.end + 8:.1f}" y2="{up - 4:.1f}"/>'
            f'<text x="{x.end + 12:.1f}" y="{up:.1f}">{escape(text)}</text>'
        )
    return parts
