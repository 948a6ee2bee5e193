"""Datasets as sequences of rows: json, jsonl, csv, parquet and text files, folders, hub ids.

A row is a dict of columns. Nothing here knows what a prompt is.
"""

import csv
import importlib.util
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from gearshift.engine.config.assets import resolve
from gearshift.engine.config.schema import SourceConfig

Row = dict[str, Any]


class Joined(Sequence):
    """Several sequences of rows, end to end."""

    def __init__(self, parts: list[Sequence[Row]]):
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Row:
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


class ParquetRows(Sequence):
    """Rows of a pyarrow table, turned into Python objects one at a time."""

    def __init__(self, table: Any):
        self.table = table
        self.column_names = table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Row:
        return self.table.slice(index, 1).to_pylist()[0]


def read_rows(source: SourceConfig) -> Sequence[Row]:
    """All rows of a dataset, in its own order.

    source.path: a file, a folder (every readable file in it, by name), `asset:NAME` or a hub id.
    Text files have one row per line, in the column `source.prompt_key`.
    Raises ValueError naming the file, the line and the fix; OSError when the hub does not answer.
    """
    name = resolve(source.path)
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _read_folder(path, source)
    elif path.is_file():
        rows = _read_file(path, source)
    elif path.suffix in READERS or path.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"{source.path}: no such data file or folder")
    else:
        rows = _read_hub(source)
    if not len(rows):
        raise ValueError(f"{source.path}: has no rows")
    return rows


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Names of all columns, in the order of their first appearance."""
    if isinstance(rows, Joined):
        return list(dict.fromkeys(name for part in rows.parts for name in columns_of(part)))
    if isinstance(rows, list):
        return list(dict.fromkeys(name for row in rows for name in row))
    return list(rows.column_names)


def _read_folder(folder: Path, source: SourceConfig) -> Sequence[Row]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in READERS and p.is_file())
    if not files:
        raise ValueError(f"{source.path}: no file in it ends in {', '.join(READERS)}")
    return Joined([_read_file(file, source) for file in files])


def _read_file(path: Path, source: SourceConfig) -> Sequence[Row]:
    if path.suffix not in READERS:
        raise ValueError(f"{path}: cannot read {path.suffix!r}; use {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path, source)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); convert it") from None


def _read_json(path: Path, source: SourceConfig) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        jsonl = " (one object per line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}: not JSON: {error}{jsonl}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: must be a list of objects, [{{...}}, ...]")
    return rows


def _read_jsonl(path: Path, source: SourceConfig) -> list[Row]:
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be an object, {{...}}")
        rows.append(row)
    return rows


def _read_text(path: Path, source: SourceConfig) -> list[Row]:
    return [{source.prompt_key: line} for _, line in _lines(path)]


def _read_csv(path: Path, source: SourceConfig) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: not {len(reader.fieldnames)} cells, as the "
                    "header has"
                )
            rows.append(row)
    return rows


def _read_parquet(path: Path, source: SourceConfig) -> ParquetRows:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: reading parquet needs: pip install 'gearshift[parquet]'")
    from pyarrow import parquet

    # A plain file: read_table(path) would add columns from folder names such as split=train.
    return ParquetRows(parquet.ParquetFile(path).read())


def _read_hub(source: SourceConfig) -> Sequence[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{source.path}: no such file or folder; if it is a hub dataset, reading it needs: "
            "pip install 'gearshift[data]'"
        )
    import datasets

    return datasets.load_dataset(source.path, source.config, split=source.split)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\n")


READERS: dict[str, Callable[[Path, SourceConfig], Sequence[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
