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
from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import SourceConfig

Row = dict[str, Any]


class Joined(Sequence):
    """Several sequences of rows, end to end."""

    def __init__(self, parts: list[Sequence[Row]]):
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


class ParquetRows(Sequence):
    """Rows of a pyarrow table, turned into Python objects one at a time."""

    def __init__(self, table: Any):
        self.table = table
        self.column_names = table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        return self.table.slice(index, 1).to_pylist()[0]


def read_rows(source: SourceConfig) -> Sequence[Row]:
    """All rows of a dataset, in its own order.

    source.path: a file, a folder (every readable file in it, by name), `asset:NAME` or a hub id.
    Text files have one row per line, in the column `source.prompt_key`.
    Raises ConfigError naming the file, the line and the fix; OSError when the hub does not answer.
    """
    name = resolve(source.path)
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _read_folder(path, source)
    elif path.is_file():
        rows = _read_file(path, source)
    elif path.suffix in READERS or path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(source.path, "no such data file or folder")
    else:
        rows = _read_hub(source)
    refuse_if(not len(rows), source.path, "has no rows")
    return rows


def columns_of(rows: Any) -> list[str]:
    """Names of all columns, in the order of their first appearance."""
    if isinstance(rows, Joined):
        return list(dict.fromkeys(name for part in rows.parts for name in columns_of(part)))
    if isinstance(rows, list):
        return list(dict.fromkeys(name for row in rows for name in row))
    return list(rows.column_names)


def require_unicode(text: str, key: str) -> None:
    """Raises ConfigError for a lone surrogate: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(key, f"not valid Unicode ({error.reason})") from None


def _read_folder(folder: Path, source: SourceConfig) -> Sequence[Row]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in READERS and p.is_file())
    refuse_if(not files, source.path, f"no file in it ends in {', '.join(READERS)}")
    return Joined([_read_file(file, source) for file in files])


def _read_file(path: Path, source: SourceConfig) -> Sequence[Row]:
    problem, fix = f"cannot read {path.suffix!r}", f"use {', '.join(READERS)}"
    refuse_if(path.suffix not in READERS, str(path), problem, fix)
    try:
        return READERS[path.suffix](path, source)
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"not UTF-8 text ({error.reason})", "convert it") from None


def _read_json(path: Path, source: SourceConfig) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        jsonl = " (one object per line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise ConfigError(str(path), f"not JSON: {error}{jsonl}") from None
    wrong = not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows)
    refuse_if(wrong, str(path), "must be a list of objects, [{...}, ...]")
    return rows


def _read_jsonl(path: Path, source: SourceConfig) -> list[Row]:
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}", f"not JSON: {error}") from None
        wrong = not isinstance(row, dict)
        refuse_if(wrong, f"{path}, line {number}", "must be an object, {...}")
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
            wrong = None in row or None in row.values()
            problem = f"not {len(reader.fieldnames or [])} cells, as the header has"
            refuse_if(wrong, f"{path}, line {reader.line_num}", problem)
            rows.append(row)
    return rows


def _read_parquet(path: Path, source: SourceConfig) -> ParquetRows:
    if importlib.util.find_spec("pyarrow") is None:
        problem = "reading parquet needs: pip install 'gearshift[parquet]'"
        raise ConfigError(str(path), problem)
    from pyarrow import parquet

    # A plain file: read_table(path) would add columns from folder names such as split=train.
    return ParquetRows(parquet.ParquetFile(path).read())


def _read_hub(source: SourceConfig) -> Sequence[Row]:
    if importlib.util.find_spec("datasets") is None:
        fix = "if it is a hub dataset, reading it needs: pip install 'gearshift[data]'"
        raise ConfigError(source.path, "no such file or folder", fix)
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
