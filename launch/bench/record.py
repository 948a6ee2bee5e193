"""What a bench writes down: its figures as a JSON file, and the machine they were taken on."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch


def write_json(path: Path | str | None, figures: dict[str, Any]) -> None:
    """Writes the figures to `path`, where one was asked for; paths among them as text."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=1, default=os.fspath) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: the device, its clocks as they are now, the versions."""
    facts: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    if device.type != "cuda":
        return facts | {"threads": torch.get_num_threads()}
    import triton

    properties = torch.cuda.get_device_properties(device)
    facts |= {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    return facts | {"clocks": clocks()}


def clocks() -> dict[str, str] | None:
    """The GPU's clocks, temperature and power limit from nvidia-smi; None where that is missing."""
    fields = ["clocks.sm", "clocks.mem", "temperature.gpu", "power.limit"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.splitlines()[0]
    return dict(zip(fields, (value.strip() for value in first.split(",")), strict=True))
