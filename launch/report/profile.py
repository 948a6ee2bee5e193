"""The report's tables of profiled steps."""

import json
from html import escape
from pathlib import Path
from typing import Any

from gearshift.launch import profiler


def profiles(folder: Path) -> str:
    """A section for each profiled step of a run folder; empty without any."""
    files = sorted((folder / profiler.FOLDER).glob(f"step_*/{profiler.TABLE}"))
    return "".join(_section(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def _section(table: dict[str, Any]) -> str:
    details = "".join(
        f"<details><summary>{escape(phase)}: costs on the {kind}</summary>"
        f"{_table(profiler.COST_COLUMNS, profiler.cost_rows(table, phase, kind))}</details>"
        for phase, kind in profiler.costly(table)
    )
    about = "of rank 0; the traces of all ranks lie in the run folder, under profile/"
    return (
        f"<h2>Profile of step {table['step']} <small>{about}</small></h2>"
        f'<section class="card">{_table(*profiler.rows(table))}{details}</section>'
    )


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = "".join(
        f'<tr><td class="value">{escape(first)}</td>'
        + "".join(f'<td class="num">{escape(cell)}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in [columns, *rows]
    )
    return f'<div class="scroll"><table class="rows">{lines}</table></div>'
