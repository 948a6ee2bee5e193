"""Rewards: every source, both tokenizer cases, and each mistake told in one line."""

import json
import math
import textwrap
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from gearshift.engine.batch import AS_READ, Rollout
from gearshift.engine.cluster import distributed
from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import DataConfig, RewardConfig
from gearshift.engine.data.prompts import PromptEncoder
from gearshift.engine.rewards import http as reward_http
from gearshift.engine.rewards.text import check_system_turn
from gearshift.engine.rewards.total import RewardError, RewardSum, read_rows, render_for_reward
from gearshift.engine.rollout.context import positions

CHAT = [{"role": "user", "content": "name a fruit"}]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BRACKETS = (
    "{{ bos_token }} {% for m in messages %}[{{ m.role }}] {{ m.content }} [/] {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CORPUS = ["name a fruit an apple is good and a pear is fine [user] [assistant] [/] < > |"] * 4


def byte_tokenizer(template: str | None = None, vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE: the alphabet, three special tokens and a few merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        additional_special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
    )
    wrapped.chat_template = template
    return wrapped


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Whole words, a begin and an end token: nothing in common with the one above."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    core.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = template
    return wrapped


POLICY = byte_tokenizer(CHATML)


def rollout_of(prompts, responses, *, finished=True, tokenizer=POLICY, **columns) -> Rollout:
    """Left-padded prompts and right-padded responses; the end token is also the padding."""
    finished = [finished] * len(prompts) if isinstance(finished, bool) else finished
    prompt_ids = [
        tokenizer(
            text
            if isinstance(text, str)
            else tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )["input_ids"]
        for text in prompts
    ]
    end = tokenizer.eos_token_id
    response_ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + [end] * done
        for text, done in zip(responses, finished, strict=True)
    ]
    width, length = max(map(len, prompt_ids)), max(map(len, response_ids))
    left = [[end] * (width - len(ids)) + ids for ids in prompt_ids]
    right = [ids + [end] * (length - len(ids)) for ids in response_ids]
    mask = [[i < len(ids) for i in range(length)] for ids in response_ids]
    rows = len(prompts)
    return Rollout(
        prompt_ids=torch.tensor(left),
        prompt_mask=torch.tensor(
            [[i >= width - len(ids) for i in range(width)] for ids in prompt_ids]
        ),
        row_ids=torch.arange(rows),
        columns={"prompt": list(prompts)} | columns,
        response_ids=torch.tensor(right),
        response_mask=torch.tensor(mask),
        rollout_logprobs=torch.zeros(rows, length),
        finished=torch.tensor(finished),
    )


ROLLOUT = rollout_of(
    ["name a fruit", CHAT], [" an apple", "a pear"], finished=[True, False], answer=["apple", "fig"]
)


def config(**values) -> RewardConfig:
    return RewardConfig(**({"name": "r"} | values))


@pytest.fixture
def function(tmp_path):
    """Writes a reward function's source and returns the one RewardSum that uses it."""

    def make(source: str, **values) -> RewardSum:
        file = tmp_path / f"reward_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(textwrap.dedent(source))
        return RewardSum([config(function=f"{file}:reward", **values)])

    return make


def score(rewards: RewardSum, rollout: Rollout = ROLLOUT) -> list[float]:
    return rewards.scores(rollout, POLICY)[0].tolist()


# Text


def test_rows_are_the_live_text_without_the_end_token():
    rows = read_rows(ROLLOUT, POLICY)
    assert rows.prompts == ["name a fruit", CHAT]
    assert rows.completions == [" an apple", [{"role": "assistant", "content": "a pear"}]]
    assert rows.columns == {"answer": ["apple", "fig"]}
    assert rows.response_ids[0][-1] == POLICY.eos_token_id
    assert rows.response_ids[1][-1] != POLICY.eos_token_id
    assert POLICY.decode(rows.prompt_ids[1]) == "<|user|>name a fruit<|end|><|assistant|>"


def test_an_end_token_that_is_ordinary_text_is_left_out():
    class Characters:
        eos_token_id = ord(".")

        def decode(self, ids, **options):
            return "".join(map(chr, ids))

    response = torch.tensor([[ord(c) for c in "a.b."], [ord(c) for c in "a.b."]])
    rollout = replace(
        ROLLOUT,
        response_ids=response,
        response_mask=torch.ones_like(response, dtype=torch.bool),
        finished=torch.tensor([True, False]),
    )
    assert read_rows(rollout, Characters()).responses == ["a.b", "a.b."]


def test_prompts_are_decoded_where_the_dataset_column_is_missing():
    bare = replace(ROLLOUT, columns={})
    assert read_rows(bare, POLICY).prompts == ["name a fruit", "name a fruit"]


# Functions


def test_weighted_sum_and_each_by_name(tmp_path):
    file = tmp_path / "pair.py"
    file.write_text(
        "def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
        "def one(prompts, completions):\n    return [True] * len(prompts)\n"
    )
    rewards = RewardSum(
        [
            config(name="length", function=f"{file}:length", weight=2.0),
            config(name="one", function=f"{file}:one", weight=-0.5),
        ]
    )
    total, by_name = rewards.scores(ROLLOUT, POLICY)[:2]
    assert by_name["length"].tolist() == [9.0, 1.0] and by_name["one"].tolist() == [1.0, 1.0]
    assert total.tolist() == [17.5, 1.5] and total.dtype == torch.float32


def test_a_function_gets_the_columns_it_names(function):
    rewards = function(
        """
        def reward(completions, answer):
            texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
            return [float(a in t) for a, t in zip(answer, texts)]
        """
    )
    rewards.check(["prompt", "answer"])
    assert score(rewards) == [1.0, 0.0]


def test_a_function_with_columns_gets_all_and_the_token_ids(function):
    rewards = function(
        """
        def reward(prompts, completions, **columns):
            assert sorted(columns) == ["answer", "completion_ids"], sorted(columns)
            return [len(ids) for ids in columns["completion_ids"]]
        """
    )
    assert score(rewards) == [float(n) for n in ROLLOUT.lengths]


@pytest.mark.parametrize("kind", ["torch.tensor", "numpy.array", "tuple", "scalars"])
def test_arrays_and_scalars_are_numbers(function, kind):
    make = "[numpy.float32(x) for x in xs]" if kind == "scalars" else f"{kind}(xs)"
    rewards = function(
        f"""
        import numpy, torch
        def reward(prompts, completions):
            xs = [0.5, -1.0]
            return {make}
        """
    )
    assert score(rewards) == [0.5, -1.0]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("[1.0]", "returned 1 scores for 2 completions"),
        ("1.0", "returned float"),
        ("[1.0, None]", "None, not a number.*name a fruit.*a pear"),
        ("['1', 1.0]", "'1', not a number.*an apple"),
        ("[1.0, float('nan')]", "nan, not finite.*a pear"),
        ("[float('inf'), 1.0]", "inf, not finite.*an apple"),
        ("[1.0, 1e39]", "1e.39, not finite"),
        ("[1.0, 10**400]", "inf, not finite.*a pear"),
        ("[1.0, [float('inf'), float('-inf')]]", "inf, not finite.*a pear"),
        ("exit(0)", "raised SystemExit: 0 .*an apple"),
        ("[1.0, [2.0]]", "returned 1 token rewards for a completion of 2 tokens"),
        ("[1.0, {2.0}]", r"\{2.0\}, not a number"),
    ],
)
def test_an_unusable_answer_stops_the_run(function, answer, told):
    rewards = function(f"def reward(prompts, completions):\n    return {answer}\n")
    with pytest.raises(RewardError, match=f"reward 'r'.*{told}") as caught:
        score(rewards)
    assert "\n" not in str(caught.value)


def test_an_exception_names_the_row_that_caused_it(function):
    rewards = function(
        """
        def reward(prompts, completions):
            return [1 / (len(c) - 1) for c in completions]
        """
    )
    with pytest.raises(
        RewardError, match=r"'r' raised ZeroDivisionError: .*\(reward_0.py:3\); .*a pear"
    ) as caught:
        score(rewards)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert isinstance(caught.value, ValueError)


def test_long_text_is_shortened_in_errors(function):
    rewards = function("def reward(prompts, completions):\n    return [None]\n")
    long = rollout_of(["start " + "x" * 5000 + " end"], ["y" * 3000])
    with pytest.raises(RewardError) as caught:
        score(rewards, long)
    assert len(str(caught.value)) < 600 and "start" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def rewards(prompts, completions): ...", "no 'reward'; did you mean rewards\\?"),
        ("reward = 3", "reward is not a function"),
        ("class reward: ...", "reward is a class; name an instance of it"),
        ("def reward(prompts, answers): ...", "signature is .prompts, answers.*write def reward"),
        ("def reward(prompts, completions, /): ...", "write def reward"),
        ("import no_such_module", "ModuleNotFoundError.*no_such_module.*:1"),
        ("def reward(:", "SyntaxError"),
        ("raise SystemExit", "importing it raised SystemExit"),
    ],
)
def test_a_bad_function_is_refused_before_the_run(function, source, told):
    with pytest.raises(RewardError, match=told):
        function(source)


@pytest.mark.parametrize(
    "source",
    [
        "async def reward(prompts, completions): return [1.0, 2.0]",
        """
        class Judge:
            async def __call__(self, prompts, completions): return [1.0, 2.0]
        reward = Judge()
        """,
    ],
)
def test_functions_may_be_async(function, source):
    assert score(function(source)) == [1.0, 2.0]


def test_a_function_that_changes_its_arguments_changes_nothing_else(function):
    rewards = function(
        """
        def reward(prompts, completions, gold, **columns):
            scores = [float(entry.pop("a")) for entry in gold]
            gold.clear(), prompts.clear(), columns.clear()
            return scores
        """
    )
    rollout = rollout_of(["a", "b"], ["c", "d"], gold=[{"a": 1}, {"a": 2}])
    assert score(rewards, rollout) == score(rewards, rollout) == [1.0, 2.0]
    assert rollout.columns == {"prompt": ["a", "b"], "gold": [{"a": 1}, {"a": 2}]}


def test_a_mistake_on_another_rank_ends_this_one_with_the_same_line(function, monkeypatch):
    rewards = function("def reward(prompts, completions): return [1.0, 2.0]")
    there = torch.tensor([0.0, 0.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    monkeypatch.setattr(distributed, "global_sum", lambda value: value + there)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda told: [told, "r returned a set"])
    with pytest.raises(RewardError, match="^r returned a set$"):
        score(rewards)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (None, "write module:function or file.py:function"),
        ("module", "write module:function"),
        ("missing.py:reward", "no file .*missing.py"),
        ("no_such_module:reward", "importable from here"),
        ("math:sqr", "did you mean sqrt\\?"),
    ],
)
def test_a_bad_spec_is_refused(spec, told):
    with pytest.raises(RewardError, match=told):
        RewardSum([config(function=spec)])


def test_a_missing_column_is_named_before_the_run(function):
    rewards = function("def reward(completions, solution, extra=1): ...")
    with pytest.raises(RewardError, match="column 'solution'; columns: answer, prompt"):
        rewards.check(["prompt", "answer"])


# HTTP


@pytest.fixture
def endpoint(monkeypatch):
    """Starts a local endpoint; `replies` is a list of (status, body) used up in order."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(reward_http, "_FIRST_WAIT_S", 0.001)
    servers = []

    def make(replies: list) -> tuple[str, list]:
        received = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                received.append(json.loads(content))
                status, body = replies.pop(0) if len(replies) > 1 else replies[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/score", received

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def http(urls: list[str], **values) -> RewardSum:
    return RewardSum([config(kind="http", urls=urls, timeout_s=5.0, **values)])


GOOD = (200, {"scores": [0.25, -1]})


def test_endpoint_is_sent_the_rows(endpoint):
    url, received = endpoint([GOOD])
    assert score(http([url])) == [0.25, -1.0]
    assert received == [
        {
            "prompts": ["name a fruit", CHAT],
            "completions": [" an apple", [{"role": "assistant", "content": "a pear"}]],
            "columns": {"answer": ["apple", "fig"]},
        }
    ]


def test_endpoints_take_turns(endpoint):
    (first, seen_first), (second, seen_second) = endpoint([GOOD]), endpoint([GOOD])
    rewards = http([first, second])
    for _ in range(4):
        score(rewards)
    assert len(seen_first) == len(seen_second) == 2


def test_a_failing_endpoint_is_tried_again_elsewhere(endpoint):
    (broken, seen), (busy, _), (good, _) = (
        endpoint([(500, "")]),
        endpoint([(429, "")]),
        endpoint([GOOD]),
    )
    closed = "http://127.0.0.1:9/"  # the discard port: refused
    assert score(http([broken, closed, busy, good], retries=3)) == [0.25, -1.0]
    assert len(seen) == 1


def test_an_endpoint_that_stays_down_stops_the_run(endpoint):
    url, received = endpoint([(503, "")])
    told = f"no answer after 3 tries over {url}; the last: {url} answered 503"
    with pytest.raises(RewardError, match=told):
        score(http([url], retries=2))
    assert len(received) == 3


def test_a_refused_request_is_not_retried(endpoint):
    url, received = endpoint([(404, b"no such model\nmore")])
    with pytest.raises(RewardError, match="404.*no such model. A refused request is not retried"):
        score(http([url], retries=5))
    assert len(received) == 1


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html>", "did not answer JSON"),
        ({"rewards": [1]}, "must answer"),
        ({"scores": [1.0]}, "returned 1 scores for 2"),
        (b'{"scores": [1.0, NaN]}', "nan, not finite"),
        ({"scores": [1.0, "2"]}, "'2', not a number"),
    ],
)
def test_an_unusable_answer_of_an_endpoint(endpoint, body, told):
    url, _ = endpoint([(200, body)])
    with pytest.raises(RewardError, match=told):
        score(http([url]))


def test_waits_double_and_leave_the_global_generator_alone():
    import random

    reward = reward_http.HttpReward(config(kind="http", urls=["http://a"]))
    before = random.getstate()
    waits = [reward._wait_s(attempt) for attempt in range(1, 12)]
    assert random.getstate() == before
    for attempt, wait in enumerate(waits):
        longest = min(30.0, 0.5 * 2**attempt)
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize(
    ("urls", "told"),
    [([], "at least one"), (["localhost:80"], "http://"), (["http://"], "http://")],
)
def test_bad_urls_are_refused(urls, told):
    with pytest.raises(RewardError, match=told):
        http(urls)


def test_what_is_not_finite_is_sent_as_null(endpoint):
    url, received = endpoint([GOOD])
    odd = [math.nan, {"a": [math.inf, 1.5]}]
    score(http([url]), rollout_of(["a", "b"], ["c", "d"], gold=odd))
    assert received[0]["columns"]["gold"] == [None, {"a": [None, 1.5]}]


def test_a_column_that_is_no_json_is_named(endpoint):
    url, _ = endpoint([GOOD])
    odd = rollout_of(["a", "b"], ["c", "d"], when=[object(), object()])
    with pytest.raises(RewardError, match="column 'when' cannot be sent"):
        score(http([url]), odd)


# Reward models


class FakeScorer:
    """Scores a row by its length, and keeps what it was given."""

    def __init__(self, tokenizer, scores=None):
        self.tokenizer, self.scores, self.given = tokenizer, scores, None

    def score_ids(self, rows):
        self.given = rows
        return torch.tensor(self.scores or [float(len(row)) for row in rows])


def model_reward(scorer: FakeScorer, **values) -> RewardSum:
    rewards = RewardSum([config(kind="model", path="some/model", **values)])
    assert [entry.name for entry in rewards.model_configs] == ["r"]
    rewards.join({"r": scorer})
    return rewards


def render(tokenizer, rollout=ROLLOUT, chat_template=True) -> list[list[int]]:
    rows = read_rows(rollout, POLICY)
    return render_for_reward(rows, POLICY, tokenizer, chat_template=chat_template)


def test_the_same_tokenizer_reuses_the_sampled_ids():
    # Tokens that encoding the text again would merge: only the sampled ids can be meant.
    merged = POLICY("apple", add_special_tokens=False)["input_ids"]
    pieces = [POLICY.convert_tokens_to_ids(c) for c in "apple"]
    assert len(merged) < len(pieces)
    ids = torch.tensor([[*pieces, POLICY.eos_token_id]])
    odd = replace(
        ROLLOUT.rows(torch.tensor([0])),
        response_ids=ids,
        response_mask=torch.ones_like(ids, dtype=torch.bool),
    )
    prompt = POLICY("name a fruit")["input_ids"]
    assert render(byte_tokenizer(CHATML), odd) == [prompt + ids[0].tolist()]


def test_another_vocabulary_of_the_same_kind_is_told_apart():
    other = byte_tokenizer(CHATML, vocabulary=280)
    assert render(other)[0] == [*other("name a fruit an apple")["input_ids"], other.eos_token_id]


def test_a_different_tokenizer_with_a_template():
    reward = word_tokenizer(BRACKETS)
    texts = [" ".join(reward.convert_ids_to_tokens(ids)) for ids in render(reward)]
    assert texts[0] == "name a fruit an apple </s>"  # no chat: plain, closed by the end token
    # The template's own tokens, once; cut by length: the turn stays open.
    assert texts[1] == "<s> [user] name a fruit [/] [assistant] a pear"


def test_a_template_closes_the_turn_of_a_finished_response():
    reward = byte_tokenizer(BRACKETS)
    reward.bos_token = "<eos>"
    chats = rollout_of([CHAT, CHAT], ["a pear", "a pear"], finished=[True, False])
    closed, open_ = (reward.decode(ids) for ids in render(reward, chats))
    assert closed == "<eos> [user] name a fruit [/] [assistant] a pear [/] "
    assert open_ == "<eos> [user] name a fruit [/] [assistant] a pear"


@pytest.mark.parametrize("template", [None, BRACKETS])
def test_plain_text_where_there_is_no_template_or_none_is_wanted(template):
    reward = word_tokenizer(template)
    texts = [
        " ".join(reward.convert_ids_to_tokens(ids))
        for ids in render(reward, chat_template=template is None)
    ]
    assert texts == ["name a fruit an apple </s>", "name a fruit a pear"]


def rollout_as_read(prompt, answer: str = "a pear", **data) -> Rollout:
    """What the prompt stream makes of one prompt with these settings, and an answer to it."""
    text = PromptEncoder(DataConfig(**data), POLICY).read({"prompt": prompt}, "prompt")
    answered = rollout_of([text.rendered], [answer])
    return replace(answered, columns={"prompt": [text.prompt], AS_READ: [text.as_read]})


KIND = {"system_prompt": "be kind"}
BEGUN = {"role": "assistant", "content": "it is"}


@pytest.mark.parametrize(
    ("prompt", "data", "templated", "plain"),
    [
        (
            "name a fruit",
            {"chat_template": "always"},
            "[user] name a fruit [/] [assistant] a pear [/] ",
            "name a fruit\n\na pear",
        ),
        (
            CHAT,
            KIND,
            "[system] be kind [/] [user] name a fruit [/] [assistant] a pear [/] ",
            "be kind\n\nname a fruit\n\na pear",
        ),
        (
            "name a fruit",
            KIND | {"chat_template": "always"},
            "[system] be kind [/] [user] name a fruit [/] [assistant] a pear [/] ",
            "be kind\n\nname a fruit\n\na pear",
        ),
        ("name a fruit ", KIND | {"chat_template": "never"}, None, "name a fruit a pear"),
        ("name a fruit ", KIND, None, "name a fruit a pear"),
    ],
    ids=["string always", "chat system", "string always system", "string never", "string auto"],
)
def test_a_reward_model_reads_the_chat_that_the_policy_read(prompt, data, templated, plain):
    rollout = rollout_as_read(prompt, **data)
    with_template, without = byte_tokenizer(BRACKETS), byte_tokenizer(vocabulary=280)
    with_template.bos_token = "<|end|>"
    read = [tok.decode(render(tok, rollout)[0]) for tok in (with_template, without)]
    assert read == [f"<|end|> {templated}" if templated else f"{plain}<eos>", f"{plain}<eos>"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_reward_model_reads_an_answer_that_the_prompt_began(finished):
    text = PromptEncoder(DataConfig(), POLICY).read({"prompt": [*CHAT, BEGUN]}, "prompt")
    assert text.rendered.endswith("<|assistant|>it is")
    rollout = rollout_of([text.rendered], [" a pear"], finished=finished)
    rollout = replace(rollout, columns={"prompt": [text.prompt], AS_READ: [text.as_read]})
    reward = byte_tokenizer(BRACKETS)
    reward.bos_token = "<eos>"
    read = reward.decode(render(reward, rollout)[0])
    told = "<eos> [user] name a fruit [/] [assistant] it is a pear"
    assert read == told + " [/] " * finished
    plain = reward.decode(render(reward, rollout, chat_template=False)[0])
    assert plain == "name a fruit\n\nit is a pear" + "<eos>" * finished


def test_a_reward_model_s_template_gets_tools_and_variables():
    policy = byte_tokenizer("{{ tools }}{{ mood }}" + CHATML)
    row = {"prompt": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}
    text = PromptEncoder(DataConfig(chat_template_kwargs={"mood": "x"}), policy).read(row, "prompt")
    rollout = replace(
        rollout_of([text.rendered], ["a"]),
        columns={"prompt": [text.prompt], AS_READ: [text.as_read]},
    )
    reward = byte_tokenizer("{{ tools[0].function.name }} {{ mood }}" + BRACKETS)
    assert reward.decode(render(reward, rollout)[0]).startswith("f x")


def test_a_reward_model_s_template_that_refuses_a_chat_names_the_row():
    strict = byte_tokenizer("{{ raise_exception('no user') }}")
    with pytest.raises(RewardError, match="refuses it: no user; set its .*false.*name a fruit"):
        render(strict)


def test_a_function_gets_the_dataset_s_form_of_a_prompt(function):
    rewards = function(
        """
        def reward(prompts, completions, **columns):
            assert prompts == ["name a fruit"] and completions == ["a pear"]
            return [len(columns) == 1 and "completion_ids" in columns]
        """
    )
    rollout = rollout_as_read("name a fruit", chat_template="always", **KIND)
    assert score(rewards, rollout) == [1.0]


def test_a_chat_rendered_plainly_for_the_same_tokenizer():
    ids = render(POLICY, chat_template=False)
    assert ids[0] == read_rows(ROLLOUT, POLICY).prompt_ids[0] + ROLLOUT.response_ids[0].tolist()
    assert POLICY.decode(ids[1]) == "name a fruit\n\na pear"


def test_an_end_token_the_tokenizer_adds_by_itself_is_not_doubled():
    from tokenizers.processors import TemplateProcessing

    reward = word_tokenizer()
    reward.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert reward("a pear")["input_ids"][-1] == 2
    finished, cut = render(reward)
    assert (finished[0], finished[-1], finished[-2] != 2) == (1, 2, True)
    assert cut[0] == 1 and 2 not in cut


def test_a_reward_model_keeps_the_end_of_long_rows(caplog):
    scorer = FakeScorer(word_tokenizer())
    rewards = model_reward(scorer, max_tokens=4, weight=0.5)
    total, by_name = rewards.scores(ROLLOUT, POLICY)[:2]
    assert [len(row) for row in scorer.given] == [4, 4]
    end = scorer.tokenizer.convert_ids_to_tokens(scorer.given[0])
    assert end == ["fruit", "an", "apple", "</s>"]
    assert by_name["r"].tolist() == [4.0, 4.0] and total.tolist() == [2.0, 2.0]
    rewards.scores(ROLLOUT, POLICY)
    assert caplog.text.count("read without its beginning") == 1


def test_a_shortened_row_keeps_the_token_an_encoder_is_read_at():
    from tokenizers.processors import TemplateProcessing

    scorer = FakeScorer(word_tokenizer())
    scorer.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    scorer.tokenizer.cls_token = "<s>"
    model_reward(scorer, max_tokens=4).scores(ROLLOUT, POLICY)
    kept = [" ".join(scorer.tokenizer.convert_ids_to_tokens(ids)) for ids in scorer.given]
    assert kept == ["<s> an apple </s>", "<s> fruit a pear"]


@pytest.mark.parametrize(("positions", "limit"), [(None, 4096), (4, 4), (4096, 4096), (9999, 4096)])
def test_an_open_limit_is_the_model_s_positions_where_fewer(caplog, positions, limit):
    scorer = FakeScorer(POLICY)
    rewards = model_reward(scorer)
    rewards.fit("r", positions)
    assert len(caplog.records) == (limit == 4)
    if limit == 4:
        told = "reward 'r': it reads the last 4 tokens of a row, as many as it has positions"
        assert told in caplog.text
    long = rollout_of(["name " * 50], ["pear " * 5000])
    rewards.scores(long, POLICY)
    assert [len(row) for row in scorer.given] == [limit]


def test_more_tokens_than_the_model_has_positions_are_refused(caplog):
    rewards = model_reward(FakeScorer(POLICY), max_tokens=5)
    rewards.fit("r", 5)
    told = "^max_tokens=5: 'some/model' has 4 positions; use 4 or fewer$"
    with pytest.raises(ConfigError, match=told):
        rewards.fit("r", 4)
    assert not caplog.records


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_reads_as_many_tokens_as_its_positions_and_no_more(family):
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        family, vocab_size=9, num_attention_heads=1, max_position_embeddings=12, **settings
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    longest = torch.full((1, positions(config)), 5)
    assert model(longest).logits.isfinite().all()
    with pytest.raises((RuntimeError, IndexError)):
        model(torch.cat([longest, longest[:, :1]], 1))


def test_a_template_without_a_system_turn_is_refused():
    strict = byte_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match=r"^chat_template=true: .*system_prompt \(no system role"):
        check_system_turn(POLICY, strict)
    check_system_turn(strict, strict)  # the policy's own: its template judges the prompts
    for fine in (byte_tokenizer(BRACKETS), byte_tokenizer()):
        check_system_turn(POLICY, fine)


def test_a_reward_model_that_gives_nan_names_the_row():
    rewards = model_reward(FakeScorer(POLICY, [1.0, math.nan]))
    with pytest.raises(RewardError, match="nan, not finite.*a pear"):
        rewards.scores(ROLLOUT, POLICY)


def test_a_row_without_a_token_is_named():
    rewards = model_reward(FakeScorer(word_tokenizer()))
    empty = rollout_of([""], [" "], finished=False)
    with pytest.raises(RewardError, match="makes no token of prompt"):
        rewards.scores(empty, POLICY)


# The demo's


def test_sentiment():
    pytest.importorskip("vaderSentiment")
    rewards = RewardSum(
        [
            config(name="both", function="gearshift.launch.sentiment:sentiment"),
            config(name="own", function="gearshift.launch.sentiment:sentiment_of_completion"),
        ]
    )
    rollout = rollout_of(
        ["I love it: good, superb", "I love it: good, superb", CHAT],
        [" and so on", " an awful, horrible, boring mess", "what a wonderful fruit"],
    )
    by_name = rewards.scores(rollout, POLICY).by_name
    both, own = by_name["both"].tolist(), by_name["own"].tolist()
    assert both[0] > 0.8 and both[0] > both[1] and both[2] > 0.4
    assert own[0] == 0.0 and own[1] < -0.7 and own[2] == pytest.approx(both[2])


def test_sentiment_names_the_missing_package(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "gearshift.launch.sentiment", raising=False)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RewardError, match=r"pip install 'gearshift\[demo\]'"):
        RewardSum([config(function="gearshift.launch.sentiment:sentiment")])
