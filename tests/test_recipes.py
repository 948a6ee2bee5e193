"""Every recipe loads, and its plan is what docs/plan.md says."""

from pathlib import Path

import pytest

from gearshift.engine import config_check, config_load
from gearshift.engine.hardware import hardware
from gearshift.launch import plan_docs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plan.md"
NAMES = sorted(path.stem for path in plan_docs.RECIPES.glob("*.yaml") if path.stem != "demo")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_on_its_ranks(name):
    config = config_load.load(str(plan_docs.RECIPES / f"{name}.yaml"), []).config
    places = [place for recipe, *place in plan_docs.CASES if recipe == name]
    assert places, f"docs/plan.md says nothing of {name}"
    for _, gpus, nodes, _ in places:
        assert config_check.check(config, gpus * nodes) == []


@pytest.mark.parametrize("case", plan_docs.CASES, ids=lambda case: f"{case[0]}-{case[-1]}")
def test_a_recipe_is_planned_as_documented(case):
    """The whole line: figures, verdict and advice."""
    name, *place = case
    assert plan_docs.row(name, hardware(*place)) in PAGE.read_text(encoding="utf-8").splitlines()
