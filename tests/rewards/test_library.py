"""Rewards by name, options, and rewards of single tokens."""

import json
import math
import sys

import pytest
import torch

from gearshift.engine.config.schema import RewardConfig
from gearshift.engine.rewards import library
from gearshift.engine.rewards.total import RewardError, RewardSum
from tests.rewards.test_total import CHAT, POLICY, rollout_of

GSM8K = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n9 * 2 = $18.\n#### 18"


def judge(responses: list[str], name: str, columns: dict | None = None, chat=False, **options):
    """Scores by a library's reward, None where it has none."""
    columns = columns or {}
    rewards = RewardSum([RewardConfig(name="r", function=name, options=options)])
    rewards.check(columns)
    prompts = [CHAT if chat else "a"] * len(responses)
    return rewards.scores(rollout_of(prompts, responses, **columns), POLICY).total.tolist()


def refused(name: str, **options) -> str:
    with pytest.raises(RewardError) as told:
        RewardSum([RewardConfig(name="r", function=name, options=options)])
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        (GSM8K, "9 times 2 is 18, so the answer is $18.00", 1),
        (GSM8K, "The answer is 17.", 0),
        (GSM8K, "I do not know.", 0),
        ("#### 1,200", "\\boxed{1200}", 1),
        ("\\frac{1}{2}", "It is 0.5", 1),
        ("\\boxed{x^2 + 1}", "\\boxed{1 + x^2}", 1),
        (7, "that makes 7", 1),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_mathematics(answer, response, score, chat):
    pytest.importorskip("math_verify")
    assert judge([response], "math_verify", {"gold": [answer]}, chat, answer="gold") == [score]


def test_an_answer_that_is_no_mathematics_gives_no_score():
    pytest.importorskip("math_verify")
    config = RewardConfig(name="r", function="math_verify")
    rollout = rollout_of(["a"] * 12, ["so 1"] * 12, answer=["1"] * 11 + [""])
    found = RewardSum([config]).scores(rollout, POLICY)
    assert found.failed == 1 and "None, not a number" in found.fault
    with pytest.raises(RewardError, match="needs the dataset column 'answer'; columns: gold"):
        RewardSum([config]).check({"gold"})


def test_a_missing_package_is_one_line(monkeypatch):
    for name, package, options in (
        ("math_verify", "math_verify", {}),
        ("json_schema", "jsonschema", {"schema": {}}),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
        extra = {"math_verify": "math", "json_schema": "json"}[name]
        told = refused(name, **options)
        assert told.endswith(f"is not installed; pip install 'gearshift[{extra}]'")


def test_patterns():
    texts = ["#### 12", "so\n#### 12", "12"]
    assert judge(texts, "regex", pattern=r"#### \d+") == [1, 0, 0]
    assert judge(texts, "regex", pattern=r"#### \d+", match="search") == [1, 1, 0]
    assert judge(texts, "regex", pattern=r"(?s).*#### \d+") == [1, 1, 0]


SCHEMA = {
    "type": "object",
    "required": ["answer"],
    "properties": {"answer": {"type": "integer"}},
    "additionalProperties": False,
}


@pytest.mark.parametrize("kind", ["inline", "file"])
def test_json(tmp_path, kind):
    pytest.importorskip("jsonschema")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    schema = SCHEMA if kind == "inline" else str(tmp_path / "schema.json")
    texts = [
        '{"answer": 3}',
        '{"answer": "3"}',
        '{"answer": 3} and more',
        "[" * 50_000,
        "NaN",
        "[]",
    ]
    assert judge(texts, "json_schema", schema=schema) == [1, 0, 0, 0, 0, 0]
    assert judge(texts, "json_schema") == [1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("count", range(1, 30))
def test_overlong_punishment_is_the_paper_s(count):
    """Equation 13 of arXiv 2503.14476, with L_max 20 and L_cache 8, in float64."""
    longest, cache = 20.0, 8.0
    expected = 0.0
    if count > longest:
        expected = -1.0
    elif count > longest - cache:
        expected = (longest - cache - count) / cache
    punish = library.overlong(max_tokens=20, buffer=8)
    assert punish(completion_ids=[[5] * count], completions=["x"]) == [expected]
    assert library.length(tokens=10)(completion_ids=[[5] * count], completions=["x"]) == [
        -count / 10
    ]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("regex", {}, "function='regex': options: regex() missing 1 required"),
        ("regex", {"pattern": "("}, "options: pattern=(: no regular expression: missing )"),
        ("regex", {"pattern": "a", "match": "all"}, "match=all: expected full or search"),
        ("regex", {"patern": "a"}, "unexpected keyword argument 'patern'"),
        ("regexp", {}, "write module:function or file.py:function; did you mean regex?"),
        ("overlong", {"max_tokens": 4, "buffer": 5}, "buffer=5: must be at most max_tokens=4"),
        ("overlong", {"max_tokens": 4.5, "buffer": 2}, "max_tokens=4.5: must be a whole number"),
        ("length", {"tokens": 0}, "tokens=0: must be a whole number, 1 or more"),
        ("json_schema", {"schema": {"type": "nothing"}}, "schema: no JSON schema: 'nothing'"),
        ("json_schema", {"schema": 3}, "schema=3: must be a schema or a file"),
        ("json_schema", {"schema": {"items": {"$ref": "#/a"}}}, "its $ref /a leads nowhere"),
        ("json_schema", {"schema": {"$ref": "http://a.b/c"}}, "its $ref http://a.b/c leads"),
        ("regex", {"pattern": 3}, "pattern=3: must be text, in quotes"),
        ("json_schema", {"schema": "no.json"}, "schema='no.json': no JSON file: "),
    ],
)
def test_bad_options_are_one_line(name, options, told):
    pytest.importorskip("jsonschema")
    assert told in refused(name, **options)


def test_options_of_a_function_win_over_a_column(tmp_path):
    (tmp_path / "r.py").write_text(
        "def score(completions, scale, **columns):\n"
        "    assert 'scale' not in columns\n"
        "    return [scale * len(c) for c in completions]\n"
    )
    config = RewardConfig(function=f"{tmp_path / 'r.py'}:score", options={"scale": 3})
    rewards = RewardSum([config])
    rewards.check({"scale"})
    assert rewards.scores(rollout_of(["a"], ["abcd"], scale=[7]), POLICY).total.tolist() == [12]
    (tmp_path / "s.py").write_text("def score(completions):\n    return [0.0] * len(completions)\n")
    assert "unexpected keyword argument 'scale'" in refused(f"{tmp_path / 's.py'}:score", scale=3)


# Rewards of tokens

BY_TOKEN = """
def score(completions, completion_ids, **columns):
    return [[0.5 * i - 1 for i in range(len(ids))] for ids in completion_ids]

def whole(completions, **columns):
    return [10.0 * len(text) for text in completions]

def short(completions, completion_ids, **columns):
    return [[1.0] for ids in completion_ids]

def poisoned(completions, completion_ids, **columns):
    rows = [[1.0] * len(ids) for ids in completion_ids]
    rows[0][1] = float("nan")
    return rows

def mixed(completions, completion_ids, **columns):
    import torch
    return [torch.ones(len(completion_ids[0])), *[2.0] * (len(completions) - 1)]
"""


def by_token(folder, *names, weights=(1.0, 1.0)):
    (folder / "tokens.py").write_text(BY_TOKEN)
    configs = [
        RewardConfig(name=name, function=f"{folder / 'tokens.py'}:{name}", weight=weight)
        for name, weight in zip(names, weights, strict=False)
    ]
    rollout = rollout_of(["a"] * 12, ["abc", "a"] * 6, finished=[True, False] * 6)
    return rollout, RewardSum(configs).scores(rollout, POLICY)


def test_rewards_of_tokens_add_up_to_the_score_and_are_weighted(tmp_path):
    rollout, found = by_token(tmp_path, "score", "whole", weights=(2.0, 0.5))
    for row in range(12):
        live = int(rollout.lengths[row])
        own = [0.5 * i - 1 for i in range(live)]
        assert found.by_token[row].tolist()[:live] == [2 * value for value in own]
        assert not found.by_token[row, live:].any()
        assert float(found.by_name["score"][row]) == math.fsum(own)
        expected = 2 * math.fsum(own) + 0.5 * float(found.by_name["whole"][row])
        assert float(found.total[row]) == pytest.approx(expected)
    # Nothing is left for the last token where all of the score belongs to tokens.
    _, alone = by_token(tmp_path, "score")
    assert torch.equal(alone.total - alone.by_token.sum(1), torch.zeros(12))


def test_rows_may_differ_and_failures_are_settled_as_always(tmp_path):
    _, found = by_token(tmp_path, "mixed")
    assert found.total.tolist() == [4.0, *[2.0] * 11] and not found.by_token[1:].any()
    rollout, found = by_token(tmp_path, "poisoned")
    assert found.failed == 1 and "not finite" in found.fault
    others = rollout.lengths[1:].double().mean()
    assert float(found.total[0]) == pytest.approx(float(others)), "the mean of the others"
    assert not found.by_token[0].any()
    with pytest.raises(RewardError, match="returned 1 token rewards for a completion of 4 tokens"):
        by_token(tmp_path, "short")
