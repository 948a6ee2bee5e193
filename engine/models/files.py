"""The tensors of a Hugging Face checkpoint, read lazily from its safetensors files."""

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gearshift.engine.config.errors import ConfigError

# What reward models and critics of other trainers call the head that transformers calls `score`.
HEADS = ("score", "classifier", "value_head", "v_head", "v_head.summary")
LM_HEADS = ("lm_head.", "embed_out.")
READERS = 8  # threads that read a checkpoint ahead
NESTED = "language_model."  # around the text model of a vision-language checkpoint


ADAPTER_CONFIG = "adapter_config.json"  # of a directory of peft


def is_adapter(path: str | None) -> bool:
    """Whether it is a directory of peft."""
    return path is not None and (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


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
        self.location, self.directory = location, directory
        self._shards = {key: directory / name for key, name in shards.items()}

    @property
    def head(self) -> str | None:
        """The stored name of a linear score head; None without one."""
        return next((head for head in HEADS if f"{head}.weight" in self._shards), None)

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from disk: pages are read when used and given back with the tensor."""
        with safe_open(self._shards[name], "pt") as file:
            return file.get_tensor(name)

    def reader(
        self, names: dict[str, str | None], dtype: torch.dtype, device: torch.device
    ) -> Callable[[str, Tensor], Tensor]:
        """A function from a parameter of a module, by its name, to its value on `device`.

        names: of match; zeros where it has none for a parameter. The function raises ConfigError
        for a tensor of another type or shape.
        """

        def read(name: str, parameter: Tensor) -> Tensor:
            source = names[name]
            if source is None:  # a fresh head
                return torch.zeros(parameter.shape, dtype=dtype, device=device)
            value = self.read(source)
            self._check(source, value, name, parameter)
            # A mapped file comes in page by page when it is copied: to a GPU here, in a thread of
            # in_order; in host memory by whoever takes his part of it, and of that part alone.
            return value.to(device, dtype)

        return read

    def _check(self, source: str, value: Tensor, name: str, parameter: Tensor) -> None:
        if not value.is_floating_point() or value.itemsize < 2:
            problem = f"{source} is stored as {str(value.dtype).removeprefix('torch.')}"
            fix = "give a checkpoint in bf16, fp16 or fp32"
            raise ConfigError("path", problem, fix, value=repr(self.location))
        if value.shape != parameter.shape and name.startswith(("score.", "classifier.")):
            problem = f"its score head has {len(value)} labels ({source})"
            fix = "a reward model has one; train it with num_labels=1"
            raise ConfigError("path", problem, fix, value=repr(self.location))
        if value.shape != parameter.shape:
            raise ConfigError(
                "path",
                f"{source} is {list(value.shape)}, but config.json makes it "
                f"{list(parameter.shape)}",
                value=repr(self.location),
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names, sizes, headers, and of 64 pieces of each."""
        digest = hashlib.sha256()
        for path in sorted(set(self._shards.values())):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(int.from_bytes(file.read(8), "little")))
                for piece in range(64):
                    file.seek(size * piece // 64)
                    digest.update(file.read(4096))
        return digest.hexdigest()

    @property
    def names(self) -> set[str]:
        """Of all stored tensors."""
        return set(self._shards)

    def match(self, module: nn.Module, fresh: tuple[str, ...]) -> dict[str, str | None] | None:
        """Which tensor fills which parameter or persistent buffer of `module`.

        fresh: names that may be absent; they map to None and start at zero. Parameters that are not
        on meta have their values.
        Returns None when the names differ in ways that only transformers' own loader knows.
        """
        prefix, head = getattr(module, "base_model_prefix", "") + ".", self.head or "score"
        found: dict[str, str | None] = {}
        tied = getattr(module, "all_tied_weights_keys", None) or {}
        filled = {name for name, p in module.named_parameters() if not p.is_meta}
        names = [name for name in module.state_dict() if name not in filled]
        for name in names:
            bare, field = name.removeprefix(prefix), name.removeprefix("score")
            candidates = [head + field] if field != name else [name, bare, prefix + name]
            candidates += [NESTED + name, f"model.{NESTED}{bare}"]
            source = next((key for key in candidates if key in self._shards), None)
            if name in fresh and (source is None or "score.weight" in fresh):
                found[name] = None
            elif source is not None:
                found[name] = source
            elif name not in tied:
                return None
        for name in names:
            # A head that comes before the embedding whose weight it shares.
            if name not in found and tied[name] not in filled:
                if tied[name] not in found:
                    return None
                found[name] = found[tied[name]]
        return found

    def left_out(self, module: nn.Module, used: set[str]) -> list[str]:
        """Names of stored tensors of other heads and towers, which `module` has no place for.

        used: names that fill something. Raises ConfigError for any other tensor of the body: the
        model was meant to be another one.
        """
        prefix = getattr(module, "base_model_prefix", "")
        ignored = "|".join(module._keys_to_ignore_on_load_unexpected or ()) or "$^"
        buffers = {name.removeprefix(f"{prefix}.") for name, _ in module.named_buffers()}
        left = sorted(
            name
            for name in self.names - used
            if not re.search(f"inv_freq|masked_bias|{ignored}", name)
            and name.removeprefix(f"{prefix}.") not in buffers
        )
        parts = {name for name, _ in getattr(module, prefix, module).named_children()}
        text_alone = any(NESTED in name for name in used)
        for name in left:
            if parts & set(name.split(".")) and (NESTED in name or not text_alone):
                problem = f"{type(module).__name__} has no place for its tensor {name}"
                fix = "check config.json, or take the tensor out"
                raise ConfigError("path", problem, fix, value=repr(self.location))
        return left


def in_order(
    read: Callable[[str, Tensor], Tensor], parameters: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of each. Where there is a GPU several are read ahead: a mapped file comes page
    by page, which one thread does at a fraction of what a disk or the page cache gives."""
    if not torch.cuda.is_available():
        yield from ((name, read(name, parameter)) for name, parameter in parameters)
        return
    coming: deque[tuple[str, Future]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="load") as pool:
        for name, parameter in parameters:
            coming.append((name, pool.submit(read, name, parameter)))
            if len(coming) > READERS:
                first, value = coming.popleft()
                yield first, value.result()
        for name, value in coming:
            yield name, value.result()


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
