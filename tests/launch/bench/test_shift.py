"""`gearshift bench shift` on two ranks: the bytes it reports, and its refusals. No timing."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from gearshift.launch.bench.shift import add_arguments, main


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("words", [("--ranks", "0"), ("--repeats", "1")])
def test_bad_sizes_are_refused(words):
    with pytest.raises(ValueError, match=words[0]):
        main(parse(*words))


@pytest.mark.slow
def test_table_and_json_report_the_bytes_moved(tmp_path):
    file = tmp_path / "shift.json"
    sizes = ["--hidden", "128", "--layers", "1", "--vocab", "256", "--repeats", "2"]
    options = ["--ranks", "2", *sizes, "--bucket-mb", "0.05", "--json", str(file)]
    run = subprocess.run(
        [sys.executable, "-m", "gearshift.launch.cli", "bench", "shift", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(file.read_text())
    rows = {row["route"]: row for row in result["rows"]}
    assert all(name in run.stdout for name in rows) and len(rows) == 3
    exact, plain = rows["exact"], rows["all-gather"]
    assert exact["received_over_minimum"] <= 1.02 < plain["received_over_minimum"]
    assert rows["GatheredParameters"]["held_bytes"] == result["model_bytes"]
    assert exact["held_bytes"] == plain["held_bytes"] < 0.55 * result["model_bytes"]
    assert max(exact["staging_bytes"], plain["staging_bytes"]) <= result["bucket_bytes"]
