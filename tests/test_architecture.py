"""The house: sizes, which way imports run, names that must not shadow others, README's table."""

import ast
import importlib.machinery
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "kernels", "launch")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MOST_LINES = 400
MOST_FUNCTION_LINES = {"engine": 60, "launch": 60, "kernels": 120}

# Who may know DeepSpeed, at module level or inside a function.
DEEPSPEED = {
    *("roles", "hybrid", "reshard", "memory", "models", "checkpoint", "distributed"),
    *("export", "heads", "optim", "ds_config", "frozen"),
}
# Its logger's level, its version, and what a benchmark compares with.
LAUNCH_WITH_DEEPSPEED = re.compile("train|session|bench_.*")
KERNELS_MAY_IMPORT = {"torch", "triton", "gearshift"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Full names of the modules a file imports; `from a import b` gives a and a.b.

    lazy: also those inside functions.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazy else _module_level(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _module_level(child)


def packages(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)}


def rooms(path: Path) -> set[str]:
    """The rooms of ours that a file imports."""
    return {m.split(".")[1] for m in imports(path) if m.startswith("gearshift.")}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    most = MOST_FUNCTION_LINES[path.relative_to(ROOT).parts[0]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= most, f"{name(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = {"kernels": {"kernels"}, "engine": {"engine", "kernels"}, "launch": set(ROOMS)}
    assert rooms(path) <= allowed[room]
    assert not packages(path) & set(ROOMS), "import gearshift.engine, never engine"
    if room == "kernels":
        foreign = packages(path) - KERNELS_MAY_IMPORT - set(sys.stdlib_module_names)
        assert not foreign, f"kernels import torch and triton only, not {foreign}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=name)
def test_tests_import_the_package(path):
    assert not packages(path) & set(ROOMS)


def test_only_some_files_know_deepspeed():
    knowing = {path for path in FILES if "deepspeed" in packages(path)}
    engine = {path.stem for path in knowing if path.parent.name == "engine"}
    launch = {path.stem for path in knowing if path.parent.name == "launch"}
    assert engine <= DEEPSPEED
    assert all(LAUNCH_WITH_DEEPSPEED.fullmatch(stem) for stem in launch)
    assert not any(path.parent.name == "kernels" for path in knowing)


def test_the_loop_knows_neither_deepspeed_nor_transformers():
    known = packages(ROOT / "engine" / "ppo.py")
    assert not known & {"deepspeed", "transformers", "accelerate"}
    assert "torch" in known  # the reading of imports works


def test_no_circle_of_imports_in_the_engine():
    modules = {f"gearshift.engine.{path.stem}": path for path in (ROOT / "engine").glob("*.py")}
    graph = {
        module: {found for found in imports(path, lazy=False) if found in modules}
        for module, path in modules.items()
    }
    assert any(graph.values())
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {m for m in graph if m not in done and graph[m] <= done}
        assert ready, f"these import each other: {sorted(set(graph) - done)}"
        done |= ready


def test_kernels_is_no_package_of_its_own():
    """It would shadow Hugging Face's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_in_launch_hides_another_module():
    """`deepspeed launch/train.py` puts launch/ first on sys.path."""
    beside = [path for path in (ROOT / "launch").iterdir() if path.name != "__pycache__"]
    names = {p.stem for p in beside if p.suffix == ".py" and p.stem != "__init__"}
    names |= {p.name for p in beside if p.is_dir() and any(p.glob("*.py"))}
    assert "train" in names
    assert not names & set(sys.stdlib_module_names)
    common = {"datasets", "tokenizers", "evaluate", "wandb", "trackio", "tensorboard", "ray"}
    assert not names & common
    site = [path for path in sys.path if path.endswith("site-packages")]
    for module in names:
        found = importlib.machinery.PathFinder.find_spec(module, site)
        assert found is None, f"launch/{module}.py hides {found.origin}"


def listed_files(readme: str) -> list[str]:
    """First cells of the table under "Where things are"."""
    section = readme.split("\n## Where things are", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| `")]
    return [row.strip("`") for row in rows]


def test_the_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if "\n## Where things are" not in readme:
        pytest.skip('README.md has no section "Where things are"')
    listed = [entry for entry in listed_files(readme) if entry.endswith(".py")]
    assert len(listed) == len(set(listed)), "a file is listed twice"
    on_disk = {name(path) for path in FILES if path.name != "__init__.py"}
    ours = {entry for entry in listed if entry.split("/")[0] in ROOMS}
    assert ours - {"engine/__init__.py", "launch/__init__.py"} == on_disk


def test_the_table_is_read():
    page = "# x\n\n## Where things are\n\n| `engine/a.py` | b |\n|---|---|\n\n## c\n\n| `d` | e |\n"
    assert listed_files(page) == ["engine/a.py"]
