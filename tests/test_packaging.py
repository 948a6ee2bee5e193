"""What a wheel holds, what works once it is installed, and the name we share with `kernels`."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("engine", "kernels", "launch", "ds_configs", "tests", "pyproject.toml")
SOURCES += ("README.md", "LICENSE")
# The oldest release of Hugging Face's `kernels` that this transformers would use.
KERNELS_VERSION = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")

# A stand-in for Hugging Face's `kernels`: what transformers takes from it at import.
STUB = """
class _Anything:
    def __init__(self, *args, **kwargs): pass

CUDAProperties = Device = LayerRepository = LocalLayerRepository = ROCMProperties = _Anything
FuncRepository = LocalFuncRepository = KernelizeFallback = _Anything

class Mode:
    TRAINING = INFERENCE = TORCH_COMPILE = 1

def _decorator(*args, **kwargs):
    return lambda decorated: decorated

use_kernel_forward_from_hub = use_kernelized_func = use_kernel_func_from_hub = _decorator

def get_kernel(*args, **kwargs): raise NotImplementedError

get_local_kernel = kernelize = register_kernel_mapping = get_kernel
replace_kernel_forward_from_hub = use_kernel_mapping = get_kernel
"""


def python(*arguments: str, path: list[Path], cwd: Path, inherit: bool = True) -> tuple[int, str]:
    """Exit status and output of `python ARGUMENTS` with `path` first on sys.path.

    inherit=False: without the installed packages' .pth files, so without an editable gearshift.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable]
    if not inherit:
        site = [Path(p) for p in sys.path if p.endswith("site-packages")]
        command, path = [sys.executable, "-S"], [*path, *site]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout + done.stderr


# Hugging Face's package of the same name


@pytest.fixture
def hub_kernels(tmp_path):
    """A folder with a distribution `kernels` in it."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(STUB)
    info = site / f"kernels-{KERNELS_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_VERSION}\n"
    )
    return site


IMPORTS = (
    "from transformers.integrations import hub_kernels\n"
    "from transformers import LlamaForCausalLM\n"
    "import kernels\n"
    "print('is', hub_kernels.is_kernels_available(), kernels.__file__)"
)


def test_transformers_finds_the_other_kernels_package(hub_kernels, tmp_path):
    """`deepspeed` puts the working directory on PYTHONPATH: the repository is first."""
    status, told = python("-c", IMPORTS, path=[ROOT, hub_kernels], cwd=tmp_path)
    assert status == 0, told
    assert told.splitlines()[-1] == f"is True {hub_kernels / 'kernels' / '__init__.py'}"


@pytest.mark.slow
def test_a_regular_package_would_hide_it(hub_kernels, tmp_path):
    """What the test above guards against does happen."""
    (tmp_path / "repo" / "kernels").mkdir(parents=True)
    (tmp_path / "repo" / "kernels" / "__init__.py").write_text("")
    code = "import transformers.integrations.hub_kernels"
    status, told = python("-c", code, path=[tmp_path / "repo", hub_kernels], cwd=tmp_path)
    assert status == 1 and "ImportError: cannot import name" in told


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for source in SOURCES:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, folder / source)
    pip("wheel", "--no-build-isolation", "-w", str(folder / "dist"), str(folder))
    (built,) = (folder / "dist").glob("gearshift-*.whl")
    return built


def pip(command: str, *arguments: str) -> None:
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        f"gearshift/{path.relative_to(ROOT).as_posix()}"
        for pattern in ("engine/**/*.py", "kernels/**/*.py", "launch/**/*.py", "ds_configs/*.json")
        + ("launch/recipes/**/*.yaml",)
        for path in ROOT.glob(pattern)
    }
    expected.add("gearshift/launch/report/page.html")
    assert names == expected
    assert {"demo.yaml", "papers"} <= {name.split("/")[3] for name in names if "/recipes/" in name}


@pytest.mark.slow
def test_an_installed_wheel_works_anywhere(wheel, tmp_path):
    target = tmp_path / "installed"
    pip("install", "--target", str(target), str(wheel))

    def run(*arguments: str) -> tuple[int, str]:
        return python(*arguments, path=[target], cwd=tmp_path, inherit=False)

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("-m", "gearshift.launch.cli", "--version") == (0, f"gearshift {version}\n")
    status, told = run(
        "-c",
        "from pathlib import Path\n"
        "import gearshift.launch.train\n"
        "from gearshift.engine.config import deepspeed, load\n"
        "from gearshift.launch.commands import demo\n"
        "from gearshift.launch.report import page\n"
        "from gearshift.kernels import ops\n"
        "print(deepspeed.find('actor_zero3'))\n"
        "recipe = demo.LAUNCH / 'recipes' / 'demo.yaml'\n"
        "assert load.load(str(recipe), []).config.actor.path == 'asset:smollm2'\n"
        "print(ops.__file__)",
    )
    assert status == 0, told
    shipped, ops = told.splitlines()[-2:]
    assert shipped == str(target / "gearshift" / "ds_configs" / "trained_zero3.json")
    assert ops == str(target / "gearshift" / "kernels" / "ops.py")
    for room in ("engine", "kernels", "launch"):
        status, told = run("-c", f"import {room}")
        assert status == 1 and f"No module named '{room}'" in told
