"""GGUF -> a dequantised Hugging Face directory, once, in a cache.

The conversion runs in a child process, so that no training rank ever holds the whole model.
Run as `python -m gearshift.engine.models.gguf SOURCE.gguf DIRECTORY`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from gearshift.engine.config.assets import cache_dir
from gearshift.engine.config.errors import ConfigError


def as_directory(source: Path) -> Path:
    """The float32 Hugging Face directory of a GGUF file; converts it on first use.

    Raises ConfigError when the file is missing or transformers cannot read it.
    """
    if not source.is_file():
        raise ConfigError("path", "no such file", value=repr(str(source)))
    stat = source.stat()
    key = hashlib.sha256(f"{source.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    target = cache_dir() / "converted" / f"{source.stem}-{key.hexdigest()[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.is_dir():
            return target
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "gearshift.engine.models.gguf", str(source), str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
            problem = f"cannot be converted: {cause}"
            raise ConfigError("path", problem, value=repr(str(source)))
        os.replace(partial, target)
    return target


def convert(source: Path, target: Path) -> None:
    """Writes config, tokenizer and float32 safetensors of `source` into `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    origin = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **origin,
    )
    model.config._name_or_path = ""
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **origin).save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
