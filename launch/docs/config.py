"""Write docs/config.md: every key, from the dataclasses themselves, below the introduction."""

import argparse
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from gearshift.engine.config.keys import BOUNDS, bare, described, entry_type
from gearshift.engine.config.schema import Config


def document(page: str = "# Configuration\n") -> str:
    """The whole page. page: as it was; what stands before its sections stays."""
    return "\n".join([page.partition("\n## ")[0], *_section(Config, "")])


def _section(kind: type, key: str) -> list[str]:
    rows, nested = [], []
    for entry in fields(kind):
        kind = bare(entry.type)
        inner = kind if is_dataclass(kind) else entry_type(kind)
        if inner is None:
            rows.append(_row(entry))
            continue
        name = f"{key}.{entry.name}" if key else entry.name
        name += "" if is_dataclass(kind) else ".N"
        text = entry.metadata["description"]
        nested += [f"## {name}", "", f"{text[0].upper()}{text[1:]}.", ""]
        nested += _section(inner, name)
    head = ["| key | default | type | meaning |", "|---|---|---|---|"]
    return [*head, *rows, "", *nested] if rows else nested


def _row(entry: Field) -> str:
    cells = [f"`{entry.name}`", f"`{_default(entry)}`", described(entry.type) + _bounds(entry)]
    return f"| {' | '.join([*cells, entry.metadata['description']])} |"


def _default(entry: Field) -> str:
    default: Any = entry.default if entry.default is not MISSING else entry.default_factory()
    if isinstance(default, float):
        return f"{default:g}"
    return yaml.safe_dump(default, default_flow_style=True).split("\n")[0]


def _bounds(entry: Field) -> str:
    told = entry.metadata
    return "".join(f", {word} {told[name]}" for name, word in BOUNDS.items() if name in told)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="docs/config.md", metavar="FILE", help="%(default)s")


def main(args: argparse.Namespace) -> int:
    page = Path(args.output)
    before = [page.read_text(encoding="utf-8")] if page.exists() else []
    page.write_text(document(*before), encoding="utf-8")
    print(f"wrote {args.output}")
    return 0
