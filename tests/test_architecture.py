"""The house: sizes, which way imports run, names that must not shadow others, README's tables."""

import ast
import importlib.machinery
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = ("engine", "kernels", "launch")
FILES = sorted(path for top in TOP for path in (ROOT / top).rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
MOST_LINES, MOST_FILES = 500, 12
MOST_FUNCTION_LINES = {"engine": 60, "launch": 60, "kernels": 120}

# A room is a folder of engine/, a file that stands in engine/ itself, or one of the other two
# folders. It imports from rooms that stand left of it, never from its neighbours between two bars.
ORDER = """
    kernels | config | cluster | batch phase trace |
    data rewards attention zero objective microbatch |
    gearbox | rollout streaming | models | metrics guards log | roles contrast | ppo |
    assemble checkpoint evaluate | plan | launch
"""
LEVELS = [group.split() for group in ORDER.split("|")]

# Who may know DeepSpeed, at module level or inside a function.
DEEPSPEED = {"config", "cluster", "zero", "gearbox", "streaming", "models", "roles"}
# Its logger's level, its version, and what a benchmark compares with.
LAUNCH_WITH_DEEPSPEED = re.compile(r"train|session|bench/.*")
# Its fields of a parameter and of an optimizer, which one file reads. `ds_opt_adam` is no part of
# them: DeepSpeedCPUAdam's own arithmetic.
PRIVATE = re.compile(
    r"ds_(?!opt_adam$)\w+|\w*(fp16|fp32|bf16|bit16)_\w*groups\w*|\w*_hp_\w+|[lh]p_fragment\w*|"
    r"\w*grad_partition\w*|ipg_buckets|final_location|partition_numel|real_dp_process_group"
)
LAYOUT = ROOT / "engine" / "zero" / "layout.py"
KERNELS_MAY_IMPORT = {"torch", "triton", "gearshift"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports, also in functions; `from a import b`: a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)}


def room(module: str) -> str:
    """The room of a full module name; "" for what is no part of one."""
    _, top, *rest = module.split(".")
    if top != "engine":
        return top
    return rest[0] if rest else ""


def module_of(path: Path) -> str:
    return ".".join(("gearshift", *path.relative_to(ROOT).with_suffix("").parts))


def arrows(path: Path) -> set[tuple[str, str]]:
    """(room of the file, room that it imports from), where those differ."""
    own, known = room(module_of(path)), set(map(module_of, FILES))
    found = {room(module) for module in imports(path) if module in known}
    return {(own, other) for other in found - {own, ""}}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    most = MOST_FUNCTION_LINES[path.relative_to(ROOT).parts[0]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= most, f"{name(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_folder_is_a_concept(folder):
    """Few files, and none of them a folder spelled as a prefix."""
    stems = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert len(stems) <= MOST_FILES
    prefixes = [stem.split("_")[0] for stem in stems if "_" in stem]
    for prefix in prefixes:
        alike = [stem for stem in stems if stem == prefix or stem.startswith(f"{prefix}_")]
        assert len(alike) == 1, f"{name(folder)}: {alike}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path):
    level = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
    back = {(a, b) for a, b in arrows(path) if level[b] >= level[a]}
    assert not back
    assert not packages(path) & set(TOP), "import gearshift.engine, never engine"
    if path.is_relative_to(ROOT / "kernels"):
        foreign = packages(path) - KERNELS_MAY_IMPORT - set(sys.stdlib_module_names)
        assert not foreign, f"kernels import torch and triton only, not {foreign}"


def test_every_room_is_in_the_table():
    listed = [room for rooms in LEVELS for room in rooms]
    assert len(listed) == len(set(listed))
    assert set(listed) == {room(module_of(path)) for path in FILES} - {"__init__"}
    assert ("launch", "ppo") in set().union(*map(arrows, FILES))  # the reading of arrows works


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=name)
def test_tests_import_the_package(path):
    assert not packages(path) & set(TOP)


def test_only_some_files_know_deepspeed():
    knowing = {path for path in FILES if "deepspeed" in packages(path)}
    engine = {room(module_of(path)) for path in knowing if path.is_relative_to(ROOT / "engine")}
    launch = [path for path in knowing if path.is_relative_to(ROOT / "launch")]
    assert engine <= DEEPSPEED
    for path in launch:
        inside = path.relative_to(ROOT / "launch").with_suffix("").as_posix()
        assert LAUNCH_WITH_DEEPSPEED.fullmatch(inside), name(path)
    assert not any(path.is_relative_to(ROOT / "kernels") for path in knowing)


def attributes(path: Path) -> set[str]:
    """Names of attributes that a file reads or writes, also by getattr and its like."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and re.fullmatch(r"\w+attr", getattr(node.func, "id", "")):
            found |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_one_file_reads_the_private_fields_of_deepspeed(path):
    private = set(filter(PRIVATE.fullmatch, attributes(path)))
    if path == LAYOUT:
        assert private >= {"ds_tensor", "fp16_groups", "_hp_mapping", "ipg_buckets"}
    else:
        assert not private, f"{name(path)}: ask zero/layout.py instead of reading {private}"


def test_the_loop_knows_neither_deepspeed_nor_transformers():
    known = packages(ROOT / "engine" / "ppo.py")
    assert not known & {"deepspeed", "transformers", "accelerate"}
    assert "torch" in known  # the reading of imports works


def test_no_circle_of_imports():
    """Between files, also by imports inside functions."""
    modules = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    graph = {
        module: {found for found in imports(path) if found in modules}
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


@pytest.mark.parametrize(
    ("folder", "script"), [("launch", "train"), ("launch/bench", "step"), ("launch/gpu", "check")]
)
def test_no_file_beside_a_script_hides_another_module(folder, script):
    """`deepspeed launch/train.py` puts launch/ first on sys.path."""
    beside = [path for path in (ROOT / folder).iterdir() if path.name != "__pycache__"]
    names = {p.stem for p in beside if p.suffix == ".py" and p.stem != "__init__"}
    names |= {p.name for p in beside if p.is_dir() and any(p.glob("*.py"))}
    assert script in names
    assert not names & set(sys.stdlib_module_names)
    common = {
        "kernels",
        "trl",
        "datasets",
        "tokenizers",
        "evaluate",
        "wandb",
        "trackio",
        "tensorboard",
        "ray",
    }
    assert not names & common
    site = [path for path in sys.path if path.endswith("site-packages")]
    for module in names:
        found = importlib.machinery.PathFinder.find_spec(module, site)
        assert found is None, f"{folder}/{module}.py hides {found.origin}"


def listed_folders(readme: str) -> list[str]:
    """First cells of the table under "The house"."""
    section = readme.split("\n## The house", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| `")]
    return [row.strip("`").rstrip("/") for row in rows]


def test_the_readme_lists_every_folder():
    listed = listed_folders((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(listed) == len(set(listed)), "a folder is listed twice"
    assert set(map(name, FOLDERS)) <= set(listed)
    for entry in listed:
        assert (ROOT / entry).exists(), f"README.md: there is no {entry}"


def test_the_table_is_read():
    page = "# x\n\n## The house\n\n| `engine/a/` | b |\n|---|---|\n\n## c\n\n| `d` | e |\n"
    assert listed_folders(page) == ["engine/a"]


def test_the_story_names_what_exists():
    """`engine/ppo.py: PPOTrainer.update` in README's story of one step."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Life of one step", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r"`(\S+\.py): ([\w.]+)`", section)
    assert len(named) >= 6
    for file, thing in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        for part in thing.split("."):
            assert re.search(rf"^\s*(class|def) {part}\b", text, re.M), f"{file}: {thing}"
