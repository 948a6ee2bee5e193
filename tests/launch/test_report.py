"""`gearshift report`: the page stands alone, escapes what it shows, survives gaps in the data."""

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gearshift.engine.config import load as config_load
from gearshift.launch.report import page as report
from gearshift.launch.report.data import condense, load_run, spans
from gearshift.launch.report.svg import Axis, nice_ticks, short

VOID = {"meta", "link", "br", "hr", "img", "input"}


def figures(step: int) -> dict:
    return {
        "step": step,
        "episode": step * 8,
        "objective/scores": 0.1 * step,
        "objective/scores_std": 0.2,
        "objective/kl": 0.5 * step,
        "rewards/good/mean": 0.1,
        "rewards/brief/mean": 0.3,
        "response_length/mean": 20.0,
        "response_length/min": 3,
        "response_length/max": 64,
        "rollout/logprob_error_mean": 1e-6,
        "rollout/logprob_error_max": 1e-4,
        "timing_s/step": 10.0,
        "timing_s/generate": 6.0,
        "timing_s/update_actor": 3.0,
        "memory_gb/generate": 12.5,
    }


def write_run(folder: Path, lines: list[dict], samples: list[dict] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in (("metrics", lines), ("samples", samples)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would fetch or run."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(folder: Path) -> tuple[str, Page]:
    text = report.write_report(folder).read_text()
    return text, Page(text)


def test_the_page_is_whole_and_makes_no_request(tmp_path):
    folder = write_run(tmp_path / "run", [figures(s) for s in range(1, 6)])
    resolved = config_load.load(None, ["--run.steps", "5", "--ppo.kl_coef", "0.07"])
    (folder / "config.yaml").write_text(config_load.dump(resolved))
    (folder / "environment.json").write_text(
        json.dumps({"command": ["deepspeed", "train.py"], "versions": {"torch": "2.13"}})
    )
    text, page = page_of(folder)
    shown = "".join(page.text)
    assert page.links == ["data:,"] and "script" not in page.tags
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text
    assert "@import" not in text and "default-src 'none'" in text
    assert "finished" in shown and "0.07" in shown and "deepspeed train.py" in shown
    assert "versions torch" in shown and "12.50 GB" in shown
    settings = [line.split(":")[0].strip() for line in re.findall(r'class="set">([^<]*)', text)]
    assert settings == ["steps", "kl_coef"]
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)


def test_hovering_and_legend_give_the_values(tmp_path):
    folder = write_run(tmp_path / "run", [figures(1), figures(2)])
    text, page = page_of(folder)
    assert "<title>step 2\nscore 0.2</title>" in text
    assert "<title>step 1: 10 s" not in text and "<title>step 1: 10.00 s\n" in text
    shown = "".join(page.text)
    for name, share in (("generate", "60%"), ("update_actor", "30%"), ("other", "10%")):
        assert name + share in shown


def test_hostile_samples_are_shown_as_text(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=y>\"'&\x1b[31m\x00"
    samples = [
        {"step": 1, "prompt": evil, "response": evil, "score": 0.5},
        {"step": 2, "prompt": [{"role": "user", "content": evil}], "response": "ok", "score": None},
    ]
    folder = write_run(tmp_path / "run", [figures(1), figures(2)], samples)
    text, page = page_of(folder)
    assert "script" not in page.tags and "img" not in page.tags
    assert "\x1b" not in text and "\x00" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    assert "Step 1" in text and "Step 2" in text and "no score" in text


def test_first_and_last_samples_are_paired(tmp_path):
    samples = [
        {"step": step, "prompt": f"p{i}", "response": f" r{step}-{i}", "score": 1.0}
        for step in (1, 5, 10)
        for i in range(2)
    ]
    folder = write_run(tmp_path / "run", [figures(1)], samples)
    shown = "".join(page_of(folder)[1].text)
    order = [shown.index(name) for name in ("r1-0", "r10-0", "r1-1", "r10-1")]
    assert order == sorted(order) and "r5-0" not in shown


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([], id="no step yet"),
        pytest.param([{"step": 1}], id="no keys"),
        pytest.param([figures(1)], id="one step"),
        pytest.param([dict.fromkeys(figures(1), None) | {"step": 1}], id="all null"),
        pytest.param([figures(1), {"step": 2, "objective/scores": None}, figures(3)], id="a gap"),
        pytest.param([{"step": s, "timing_s/generate": 0.0} for s in (1, 2)], id="no time"),
        pytest.param([figures(s) for s in range(1, 1001)], id="long"),
    ],
)
def test_any_run_gives_a_page(tmp_path, lines):
    text, page = page_of(write_run(tmp_path / "run", lines))
    assert "nan" not in text.lower().split("<body>")[1] and "inf" not in "".join(page.text)
    assert len(text) < 1_500_000


def test_roles_that_a_run_lacks_are_not_shown(tmp_path):
    folder = write_run(tmp_path / "run", [figures(1) | {"objective/kl": 0.0}])
    changes = ["--ppo.kl_coef", "0", "--ppo.estimator", "rloo", "--ppo.samples_per_prompt", "2"]
    (folder / "config.yaml").write_text(config_load.dump(config_load.load(None, changes)))
    shown = "".join(page_of(folder)[1].text)
    assert "KL to the reference" not in shown and "critic lr" not in shown and "actor lr" in shown


def test_a_gap_breaks_the_line(tmp_path):
    lines = [figures(s) for s in range(1, 8)]
    lines[3]["objective/kl"] = None
    text = page_of(write_run(tmp_path / "run", lines))[0]
    card = text.split("<h3>KL to the reference</h3>")[1].split("</section>")[0]
    points = [len(found.split()) for found in re.findall(r'<polyline[^>]*points="([^"]*)"', card)]
    assert points == [3, 3]


def test_the_line_that_is_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", [figures(1)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "objec')
    assert load_run(folder).steps == [1]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        report.write_report(tmp_path)
    folder = write_run(tmp_path / "run", [figures(1)])
    (folder / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
        report.write_report(folder)


def test_command_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [figures(1)])
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.main(parser.parse_args([str(folder)])) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    target = tmp_path / "other.html"
    report.main(parser.parse_args([str(folder), "--output", str(target)]))
    assert target.read_text() == (folder / "report.html").read_text()


def test_condense_keeps_means_and_extremes():
    groups = spans(5, 2)
    assert groups == [range(0, 3), range(3, 5)]
    first, second = condense([1.0, None, 5.0, None, None], groups)
    assert (first.mean, first.low, first.high) == (3.0, 1.0, 5.0) and second is None
    assert len(spans(10_000, 160)) <= 160 and spans(3, 160) == [range(i, i + 1) for i in range(3)]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.31, 0.72), (1e-7, 3e-6), (99_990, 100_010), (-5e6, 2e6)]
)
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in ticks)
    width = ticks[1] - ticks[0]
    assert f"{width:.0e}"[0] in "125"


def test_log_axis_spans_decades():
    axis = Axis(-6.1, -1.9, 100.0, 0.0, log=True)
    assert axis.ticks(5) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    assert axis.at(1e-4) == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-6, "1e-6"), (2.5e-7, "2.5e-7"), (0.05, "0.05"), (-3.14159, "-3.142")]
    + [(12_345, "12.3k"), (9_999, "9999"), (2.5e6, "2.5M"), (7e9, "7G")],
)
def test_short_numbers(value, text):
    assert short(value) == text
