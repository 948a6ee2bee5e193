"""Files that `gearshift fetch` brought: where they lie, and the `asset:` form of a path.

A path in a configuration may be written `asset:NAME` (the asset's main file) or `asset:NAME/FILE`.
"""

import os
from pathlib import Path

from gearshift.engine.config.errors import ConfigError, did_you_mean, refuse_if

PREFIX = "asset:"

# The files of every asset, its main file first.
FILES: dict[str, tuple[str, ...]] = {
    "smollm2": ("SmolLM2-135M-Instruct.Q4_1.gguf",),
    "movie-prompts": ("prompts.jsonl", "reviews.jsonl"),
    "gsm8k": ("train.jsonl", "test.jsonl"),
    "imdb": ("prompts.jsonl", "reviews.jsonl"),
}


def cache_dir() -> Path:
    """$GEARSHIFT_CACHE, or ~/.cache/gearshift."""
    return Path(os.environ.get("GEARSHIFT_CACHE") or "~/.cache/gearshift").expanduser()


def asset_path(name: str, file: str | None = None) -> Path:
    """The path of an asset's main file, or of another of its files.

    Raises ConfigError when there is no such asset or file, or when it was not fetched.
    """
    require_known(name)
    file = file or FILES[name][0]
    fix = f"the asset has {', '.join(FILES[name])}"
    refuse_if(file not in FILES[name], f"{PREFIX}{name}/{file}", "no such file", fix)
    path = cache_dir() / name / file
    problem, fix = f"{path} is not there", f"run: gearshift fetch {name}"
    refuse_if(not path.is_file(), f"{PREFIX}{name}", problem, fix)
    return path


def require_known(name: str) -> None:
    """Raises ConfigError, with the nearest name, unless `name` is an asset's."""
    if name in FILES:
        return
    fix = f"{did_you_mean(name, FILES)} There are {', '.join(FILES)}"
    raise ConfigError(name, "no such asset", fix.lstrip())


def resolve(path: str) -> str:
    """`asset:NAME[/FILE]` becomes the path of that file; any other path is returned as it is."""
    if not path.startswith(PREFIX):
        return path
    name, _, file = path.removeprefix(PREFIX).partition("/")
    return str(asset_path(name, file or None))
