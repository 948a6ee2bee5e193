"""Run on ranks: OUT/rank<r>.jsonl tells which rows this rank looked at, and what all then know.

sift_on_ranks.py OUT ROWS.jsonl
"""

import json
import sys
from pathlib import Path

from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import SourceConfig
from gearshift.engine.data.mixture import Walk


def sifted(path: str, drop: bool) -> dict:
    walk = Walk(SourceConfig(path=path), 0, seed=0, shuffle=True)
    looked: list[int] = []

    def read(row: dict) -> None:
        looked.append(row["prompt"])
        refuse_if(row["prompt"] % 5 == 3, "prompt", "is of the wrong sort")

    told = ""
    try:
        walk.sift(read, drop=drop)
    except ConfigError as error:
        told = str(error)
    return {"looked": looked, "told": told, "left": walk.numbers.tolist()}


if __name__ == "__main__":
    out, rows = sys.argv[1:]
    distributed.start(1)
    text = "".join(json.dumps(sifted(rows, drop)) + "\n" for drop in (True, False))
    (Path(out) / f"rank{distributed.rank()}.jsonl").write_text(text)
