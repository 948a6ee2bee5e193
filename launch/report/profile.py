"""The report's tables of profiled steps."""

import json
from pathlib import Path
from typing import Any

from gearshift.launch import profiler


def profiles(folder: Path) -> list[dict[str, Any]]:
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
