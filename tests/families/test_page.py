"""docs/families.md: every family is there, and what it says of some comes out again."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import page as families
from tests.tiny import job as tiny_job

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "families.md"


def test_the_page_lists_every_family():
    if families.VERSIONS not in PAGE.read_text(encoding="utf-8"):
        pytest.skip(f"the page was made with others than {families.VERSIONS}")
    rows = families.read(PAGE)
    assert families.page(rows) == PAGE.read_text(encoding="utf-8")
    assert rows.keys() == families.FAMILIES.keys()
    assert not {name for name, row in rows.items() if row[1] in ("wrong", "traceback")}


@pytest.mark.slow
def test_families_are_tried(tmp_path):
    """One that works, one that is padded and cached by another name, one that is refused."""
    command = [sys.executable, "-m", "tests.families.page", "llama", "mamba", "bert"]
    made = tmp_path / "families.md"
    subprocess.run(
        [*command, "--out", str(made)],
        check=True,
        env=tiny_job.environment(),
        timeout=1500,
        cwd=ROOT,
    )
    found = families.read(made)
    assert found["llama"][1:] == ["works", "packed", "paged", "yes", "2", ""]
    assert found["mamba"][1:5] == ["works padded", "padded", "padded", "none"]
    assert found["bert"][1] == "refused" and "supported" in found["bert"][-1]
    assert found == {name: families.read(made)[name] for name in ("llama", "mamba", "bert")}
