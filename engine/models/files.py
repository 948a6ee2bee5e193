"""The tensors of a Hugging Face checkpoint, read lazily from its safetensors files."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gearshift.engine.config.errors import ConfigError


class CheckpointFiles:
    """Names and memory-mapped tensors of a directory or hub id.

    Raises ConfigError when there is no safetensors file, or one of them is missing or broken.
    """

    def __init__(self, location: str, revision: str | None = None):
        directory = Path(location)
        if not directory.is_dir():
            directory = _snapshot(location, revision)
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if index.exists():
            shards = _weight_map(index)
        elif single.exists():
            with _opened(single) as file:
                shards = dict.fromkeys(file.keys(), single.name)
        else:
            raise ConfigError(
                "path",
                "no model.safetensors",
                "convert pickled weights with transformers' save_pretrained first",
                value=repr(location),
            )
        for name in set(shards.values()):
            if not (directory / name).exists():
                problem = f"{name} is in the index but not on disk"
                raise ConfigError("path", problem, value=repr(location))
            with _opened(directory / name):
                pass
        self.location = location
        self._shards = {key: directory / name for key, name in shards.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from disk: pages are read when used and given back with the tensor."""
        with safe_open(self._shards[name], "pt") as file:
            return file.get_tensor(name)

    def match(self, module: nn.Module, fresh: tuple[str, ...]) -> dict[str, str | None] | None:
        """Which tensor fills which parameter or persistent buffer of `module`.

        fresh: names that may be absent; they map to None and start at zero.
        Returns None when the names differ in ways that only transformers' own loader knows.
        """
        prefix = getattr(module, "base_model_prefix", "") + "."
        found: dict[str, str | None] = {}
        tied = set(getattr(module, "all_tied_weights_keys", None) or ())
        for name in module.state_dict():
            candidates = (name, name.removeprefix(prefix), prefix + name)
            source = next((key for key in candidates if key in self._shards), None)
            if name in fresh and (source is None or name == "score.weight"):
                found[name] = None
            elif source is not None:
                found[name] = source
            elif name not in tied:
                return None
        return found


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        problem = f"cut off or broken, so copy or download it again ({error})"
        raise ConfigError("path", problem, value=repr(str(file))) from None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        problem = "has no weight_map in JSON, so copy or download it again"
        raise ConfigError("path", problem, value=repr(str(index))) from None


def _snapshot(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError("path", str(error).splitlines()[0], value=repr(hub_id)) from None
