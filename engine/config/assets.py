"""Files that `gearshift fetch` brought: where they lie, and the `asset:` form of a path.

A path in a configuration may be written `asset:NAME` (the asset's main file) or `asset:NAME/FILE`.
"""

import os
from pathlib import Path

from gearshift.engine.config.errors import choices, refuse_if

PREFIX = "asset:"

# The files of every asset, its main file first, each with its sha256.
FILES: dict[str, dict[str, str]] = {
    "smollm2": {
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
    "movie-prompts": {
        "prompts.jsonl": "650cd61643cd20e667d1daa66bd29ed04a36ba1f103661e5588678d76ac7296c",
        "reviews.jsonl": "6ca50ef9a1b41341de4bb8d6d701e8a27ff20da19826f564005901f739a4cb6c",
    },
    "gsm8k": {
        "train.jsonl": "1ee1a5c293f8c9b7feb9c301d7e257b3b466f0b5aea88d44dcf019d37e5a90e7",
        "test.jsonl": "a77f348e91ee24a1e0db93ea96ff73b1022169bf079cbda72889e59f18a2f4a7",
    },
    "imdb": {
        "prompts.jsonl": "0f25a5e6b4579e8fe76698e8f42e24707e683435bdf9babb97f8421a4cce15d0",
        "reviews.jsonl": "627fd38ef9c6104677d90261bc569a338b7205cd23feb1d6d24ce9bacef817a6",
    },
}


def cache_dir() -> Path:
    """$GEARSHIFT_CACHE, or ~/.cache/gearshift."""
    return Path(os.environ.get("GEARSHIFT_CACHE") or "~/.cache/gearshift").expanduser()


def asset_path(name: str, file: str | None = None) -> Path:
    """The path of an asset's main file, or of another of its files.

    Raises ConfigError when there is no such asset or file, or when it was not fetched.
    """
    require_known(name)
    file = file or next(iter(FILES[name]))
    fix = f"the asset has {', '.join(FILES[name])}"
    refuse_if(file not in FILES[name], f"{PREFIX}{name}/{file}", "no such file", fix)
    path = cache_dir() / name / file
    problem, fix = f"{path} is not there", f"run: gearshift fetch {name}"
    refuse_if(not path.is_file(), f"{PREFIX}{name}", problem, fix)
    return path


def require_known(name: str) -> None:
    """Raises ConfigError, with the nearest name, unless `name` is an asset's."""
    refuse_if(name not in FILES, name, "no such asset", choices(name, FILES))


def resolve(path: str) -> str:
    """`asset:NAME[/FILE]` becomes the path of that file; any other path is returned as it is."""
    if not path.startswith(PREFIX):
        return path
    name, _, file = path.removeprefix(PREFIX).partition("/")
    return str(asset_path(name, file or None))
