"""Prompt and text streams: order, sharding, resuming, formats and readers."""

import csv
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gearshift.engine.batch import AS_READ
from gearshift.engine.config.schema import DataConfig, PretrainConfig, SourceConfig
from gearshift.engine.data.readers import columns_of, read_rows
from gearshift.engine.data.streams import PromptStream, TextStream, left_padded
from tests.tiny import on_ranks

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}


def tokenizer(*, post: str | None = None, template: str | None = TEMPLATE, **special):
    """One token per word: ids 0 to 2 are <s>, </s>, <unk>; pad is eos, as in many models."""
    words = ["<s>", "</s>", "<unk>", "user", "assistant", "system", "be", "kind"]
    words += [f"w{i}" for i in range(200)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post is not None:
        core.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL | special)
    fast.chat_template = template
    return fast


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(path, count: int, start: int = 0) -> str:
    rows = [{"prompt": f"w{i} w{i}", "answer": i} for i in range(start, start + count)]
    return write(path, rows)


def stream(path: str, *, tok=None, key: str = "prompt", config: dict | None = None, **batching):
    data = DataConfig(sources=[SourceConfig(path=path, prompt_key=key)], **config or {})
    batching = {"prompts_per_step": 4} | batching
    return PromptStream(data, tok or tokenizer(), **batching)


def prompts_of(batch) -> list[str]:
    return batch.columns["prompt"]


def live(batch, row: int = 0) -> list[int]:
    return batch.prompt_ids[row][batch.prompt_mask[row]].tolist()


# Order


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_prompt_does_not_depend_on_world_size(tmp_path, world_size):
    path = numbered(tmp_path / "p.jsonl", 10)
    batching = {"prompts_per_step": 8, "samples_per_prompt": 3, "seed": 5}
    alone = stream(path, **batching)
    ranks = [stream(path, rank=r, world_size=world_size, **batching) for r in range(world_size)]
    for _ in range(4):
        whole = alone.next_batch()
        of_row = dict(zip(whole.row_ids.tolist(), prompts_of(whole), strict=True))
        seen = {}
        for rank, part in enumerate(r.next_batch() for r in ranks):
            assert (part.row_ids % world_size == rank).all()
            seen |= dict(zip(part.row_ids.tolist(), prompts_of(part), strict=True))
        assert seen == of_row


def test_rows_are_sample_major_and_numbered(tmp_path):
    s = stream(numbered(tmp_path / "p.jsonl", 9), samples_per_prompt=2, rank=1, world_size=2)
    s.next_batch()
    batch = s.next_batch()
    assert batch.row_ids.tolist() == [8 + 1, 8 + 3, 8 + 4 + 1, 8 + 4 + 3]
    assert prompts_of(batch)[:2] == prompts_of(batch)[2:]
    assert batch.columns["answer"] == [int(p.split()[0][1:]) for p in prompts_of(batch)]


def test_each_epoch_is_a_new_permutation_of_all_rows(tmp_path):
    s = stream(numbered(tmp_path / "p.jsonl", 12), prompts_per_step=12)
    first, second = prompts_of(s.next_batch()), prompts_of(s.next_batch())
    assert sorted(first) == sorted(second) and len(set(first)) == 12
    assert first != second


def test_seed_decides_the_order_and_shuffle_false_keeps_the_file(tmp_path):
    path = numbered(tmp_path / "p.jsonl", 12)
    orders = [prompts_of(stream(path, prompts_per_step=12, seed=s).next_batch()) for s in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    plain = stream(path, prompts_per_step=12, config={"shuffle": False}).next_batch()
    assert plain.columns["answer"] == list(range(12))


def test_sources_are_mixed_by_weight_in_every_stretch(tmp_path):
    sources = [
        SourceConfig(path=numbered(tmp_path / "a.jsonl", 50), weight=3.0),
        SourceConfig(path=numbered(tmp_path / "b.jsonl", 50, start=100), weight=1.0),
    ]
    s = PromptStream(DataConfig(sources=sources), tokenizer(), prompts_per_step=40)
    for _ in range(5):
        from_a = sum(answer < 100 for answer in s.next_batch().columns["answer"])
        assert abs(from_a - 30) <= 2


def test_columns_are_the_union_over_sources(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": "w1", "label": 1}])
    b = write(tmp_path / "b.jsonl", [{"prompt": "w2", "level": 2}])
    sources = [SourceConfig(path=a), SourceConfig(path=b)]
    s = PromptStream(DataConfig(sources=sources), tokenizer(), prompts_per_step=8)
    assert s.columns == ["prompt", "label", "level"]
    batch = s.next_batch()
    expected = {"w1": (1, None), "w2": (None, 2)}
    rows = zip(*(batch.columns[name] for name in s.columns), strict=True)
    assert {prompt: (label, level) for prompt, label, level in rows} == expected


# Position


@pytest.mark.parametrize("resumed_world", [1, 2])
def test_resuming_continues_exactly(tmp_path, resumed_world):
    rows = [{"prompt": " ".join(["w1"] * (1 + i % 7)), "id": i} for i in range(11)]
    path = write(tmp_path / "p.jsonl", rows)
    config = {"max_prompt_tokens": 5}
    straight = stream(path, config=config, seed=3)
    for _ in range(3):
        straight.next_batch()
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = [
        stream(path, config=config, seed=3, rank=r, world_size=resumed_world)
        for r in range(resumed_world)
    ]
    for s in resumed:
        s.load_state_dict(state)
    for _ in range(4):
        expected, parts = straight.next_batch(), [s.next_batch() for s in resumed]
        found = {
            r: i for p in parts for r, i in zip(p.row_ids.tolist(), p.columns["id"], strict=True)
        }
        assert found == dict(zip(expected.row_ids.tolist(), expected.columns["id"], strict=True))
        assert resumed[0].state_dict() == straight.state_dict()


def test_resuming_refuses_other_data_or_counts(tmp_path):
    drawn = stream(numbered(tmp_path / "p.jsonl", 9))
    drawn.next_batch()
    state = drawn.state_dict()
    with pytest.raises(ValueError, match="prompts_per_step=8: .*written with 4"):
        stream(numbered(tmp_path / "p.jsonl", 9), prompts_per_step=8).load_state_dict(state)
    with pytest.raises(ValueError, match=r"seed=1: .*written with 0"):
        stream(numbered(tmp_path / "p.jsonl", 9), seed=1).load_state_dict(state)
    moved = numbered(tmp_path / "moved.jsonl", 9)
    stream(moved).load_state_dict(state)
    told = r"sources\.0\.path=.*moved\.jsonl: its {} rows are not the 9 of .*p\.jsonl; restore"
    with pytest.raises(ValueError, match=told.format(8)):
        stream(numbered(tmp_path / "moved.jsonl", 8)).load_state_dict(state)
    with pytest.raises(ValueError, match=told.format(9)):
        stream(numbered(tmp_path / "moved.jsonl", 9, start=1)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"with 2 datasets, now there are 1"):
        stream(moved).load_state_dict(state | {"sources": state["sources"] * 2})


def test_rows_that_were_not_drawn_may_change(tmp_path):
    """Mended in any order; added and deleted in the file's own."""
    drawn = stream(numbered(tmp_path / "p.jsonl", 9), config={"shuffle": False})
    drawn.next_batch()
    state = json.loads(json.dumps(drawn.state_dict()))
    for count, start in ((6, 0), (12, 0)):
        rows = numbered(tmp_path / "other.jsonl", count, start=start)
        other = stream(rows, config={"shuffle": False})
        other.load_state_dict(state)
        assert other.next_batch().columns["answer"][:2] == [4, 5]
        assert other.state_dict()["sources"][0]["drawn"] != state["sources"][0]["drawn"]
    short = stream(numbered(tmp_path / "short.jsonl", 3), config={"shuffle": False})
    with pytest.raises(ValueError, match=r"what may change are rows .* not drawn yet\)"):
        short.load_state_dict(state)
    shuffled = stream(numbered(tmp_path / "p.jsonl", 9))
    shuffled.next_batch()
    state = shuffled.state_dict()
    seen = set(shuffled.mixture.walks[0]._order[:4])
    rows = [{"prompt": f"w{i} w{i}" if i in seen else "w99", "answer": i} for i in range(9)]
    stream(write(tmp_path / "mended.jsonl", rows)).load_state_dict(state)
    rows[min(seen)]["prompt"] = "w98"
    with pytest.raises(ValueError, match="but with data.shuffle not how many"):
        stream(write(tmp_path / "mended.jsonl", rows)).load_state_dict(state)


def test_a_deleted_row_that_took_no_part_changes_nothing(tmp_path):
    rows = [{"prompt": f"w{i}" if i != 5 else None} for i in range(9)]
    drop = {"bad_rows": "drop"}
    s = stream(write(tmp_path / "p.jsonl", rows), config=drop)
    for _ in range(3):
        s.next_batch()
    mended = stream(write(tmp_path / "p.jsonl", rows[:5] + rows[6:]))
    mended.load_state_dict(s.state_dict())
    assert prompts_of(mended.next_batch()) == prompts_of(s.next_batch())


def test_rendered_example_moves_nothing(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}])
    s = stream(path)
    before = s.state_dict()
    assert s.rendered_example() == "<s> user w1 </s> <s> assistant"
    assert s.state_dict() == before


# Tensors


def test_padding_is_on_the_left_and_masked_when_pad_is_eos(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "w1 w2 w3"}, {"prompt": "w4 </s>"}])
    batch = stream(path, config={"shuffle": False}, prompts_per_step=2).next_batch()
    assert batch.prompt_ids.dtype == torch.int64
    assert batch.prompt_mask.tolist() == [[True] * 3, [False, True, True]]
    assert live(batch, 1) == [12, 1]  # the end token of the text stays live, the pad is not
    assert batch.prompt_ids[1, 0] == 1


@pytest.mark.parametrize(
    ("special", "pad"), [({}, 1), ({"pad_token": None}, 1), ({"pad_token": "<unk>"}, 2)]
)
def test_pad_token(tmp_path, special, pad):
    path = write(tmp_path / "p.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w1"}])
    tok = tokenizer(**special)
    batch = stream(path, tok=tok, config={"shuffle": False}, prompts_per_step=2).next_batch()
    assert batch.prompt_ids[1].tolist() == [pad, 9]


def test_left_padded_without_any_special_token():
    ids, mask = left_padded([[5], [6, 7]], 0)
    assert ids.tolist() == [[0, 5], [6, 7]] and mask.tolist() == [[False, True], [True, True]]


# Formats


USER = {"role": "user", "content": "w1"}
ANSWER = {"role": "assistant", "content": "w9"}
SYSTEM, OTHER = ({"role": "system", "content": text} for text in ("be kind", "w5"))
PARTS = [{"type": "text", "text": "w"}, {"type": "text", "text": "1"}]
CHAT = [0, 3, 9, 1, 0, 4]  # <s> user w1 </s> <s> assistant


@pytest.mark.parametrize(
    ("row", "mode", "expected"),
    [
        ({"prompt": "w1"}, "auto", [0, 9]),
        ({"prompt": "w1"}, "always", CHAT),
        ({"prompt": [USER]}, "auto", CHAT),
        ({"messages": [USER, ANSWER]}, "auto", CHAT),
        ({"messages": [USER, ANSWER, USER]}, "auto", [0, 3, 9, 1, 0, 4, 17, 1, *CHAT]),
        ({"prompt": [USER, ANSWER]}, "auto", [0, 3, 9, 1, 0, 4, 17]),
        ({"prompt": [{"role": "user", "content": PARTS}]}, "auto", CHAT),
        ({"messages": json.dumps([USER, ANSWER])}, "auto", CHAT),
        ({"prompt": "[ w1"}, "auto", [0, 2, 9]),
        ({"prompt": "[" * 9999 + " w1"}, "auto", [0, 2, 9]),
    ],
    ids=[
        "string",
        "wrapped",
        "chat",
        "answered",
        "long chat",
        "begun",
        "parts",
        "JSON",
        "[ text",
        "deep",
    ],
)
def test_formats(tmp_path, row, mode, expected):
    path = write(tmp_path / "p.jsonl", [row])
    tok = tokenizer(post="<s> $A")  # adds BOS to plain text, and must not add a second to a chat
    batch = stream(path, tok=tok, config={"chat_template": mode}, prompts_per_step=1).next_batch()
    assert live(batch) == expected


@pytest.mark.parametrize("key", ["messages", "conversation"])
def test_an_answer_is_dropped_whatever_the_column_is_called(tmp_path, key):
    path = write(tmp_path / "p.jsonl", [{key: [USER, ANSWER]}])
    batch = stream(path, key=key, prompts_per_step=1).next_batch()
    assert live(batch) == CHAT and prompts_of(batch) == [[USER]]


TOOLS = [{"type": "function", "function": {"name": "w3"}}]
TOOL_TEMPLATE = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{{ mood }} " + TEMPLATE


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None])
def test_tools_and_variables_reach_the_template(tmp_path, tools):
    path = write(tmp_path / "p.jsonl", [{"prompt": [USER], "tools": tools}])
    config = {"chat_template_kwargs": {"mood": "w4"}}
    tok = tokenizer(template=TOOL_TEMPLATE)
    batch = stream(path, tok=tok, config=config, prompts_per_step=1).next_batch()
    assert live(batch) == ([11] if tools else []) + [12] + CHAT
    read = {"conversation": [USER], "mood": "w4"} | ({"tools": TOOLS} if tools else {})
    assert batch.columns[AS_READ] == [read] and batch.columns["tools"] == [tools]


def test_prompt_column_is_the_dataset_s_own(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"messages": [USER, ANSWER]}])
    batch = stream(path, prompts_per_step=1).next_batch()
    assert prompts_of(batch) == [[USER]]
    assert batch.columns["messages"] == [[USER, ANSWER]]


@pytest.mark.parametrize(
    ("prompt", "config", "as_read"),
    [
        ("w1", {"chat_template": "always"}, [USER]),
        ("w1", {"chat_template": "always", "system_prompt": "be kind"}, [SYSTEM, USER]),
        ([USER], {"system_prompt": "be kind"}, [SYSTEM, USER]),
        ([OTHER, USER], {"system_prompt": "be kind"}, [OTHER, USER]),
        ("w1", {"chat_template": "never", "system_prompt": "be kind"}, "w1"),
    ],
)
def test_what_the_policy_read_travels_beside_the_dataset_s_prompt(
    tmp_path, prompt, config, as_read
):
    path = write(tmp_path / "p.jsonl", [{"prompt": prompt}])
    s = stream(path, config=config, prompts_per_step=1)
    batch = s.next_batch()
    read = {"conversation": as_read} if isinstance(as_read, list) else as_read
    assert prompts_of(batch) == [prompt] and batch.columns[AS_READ] == [read]
    assert AS_READ not in s.columns  # no column that a reward function may ask for


def test_system_prompt_only_where_there_is_none(tmp_path):
    own = {"role": "system", "content": "w5"}
    path = write(tmp_path / "p.jsonl", [{"prompt": [USER]}, {"prompt": [own, USER]}])
    config = {"system_prompt": "be kind", "shuffle": False}
    batch = stream(path, config=config, prompts_per_step=2).next_batch()
    assert live(batch, 0) == [0, 5, 6, 7, 1, *CHAT]
    assert live(batch, 1) == [0, 5, 13, 1, *CHAT]


def test_an_end_token_the_tokenizer_appends_is_removed(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "w1"}, {"prompt": "w1 </s>"}])
    tok = tokenizer(post="<s> $A </s>")
    batch = stream(path, tok=tok, config={"shuffle": False}, prompts_per_step=2).next_batch()
    assert live(batch, 0) == [0, 9]
    assert live(batch, 1) == [0, 9, 1]  # this one is part of the text


@pytest.mark.parametrize(
    ("text", "post", "expected"),
    [
        ("<s> user w1 </s>", "<s> $A", [0, 3, 9, 1]),  # a template wrote the first token
        (" <s> w1", "<s> $A", [0, 9]),
        ("<s>", "<s> $A", [0]),
        ("<s> <s> w1", "<s> $A", [0, 0, 9]),  # the second is the text's own
        ("<s> <s> w1", None, [0, 0, 9]),
        ("w1 <s>", "<s> $A", [0, 9, 0]),
        ("<s> w1", "<s> $A </s>", [0, 9]),
    ],
)
def test_a_text_that_begins_with_bos_gets_no_second(tmp_path, text, post, expected):
    path = write(tmp_path / "p.jsonl", [{"prompt": text}])
    assert live(stream(path, tok=tokenizer(post=post), prompts_per_step=1).next_batch()) == expected


@pytest.mark.parametrize("post", [None, "<s> $A", "<s> $A </s>"])
def test_prompts_without_tokens_are_dropped_and_counted(tmp_path, post):
    """Also where the tokenizer gives every text a BOS: the model would read nothing else."""
    path = write(tmp_path / "p.jsonl", [{"prompt": p} for p in ("", "w1", "  ", "w2")])
    s = stream(path, tok=tokenizer(post=post), prompts_per_step=2)
    ids = [live(s.next_batch()) for _ in range(2)]
    assert {row[-1] for row in ids} <= {9, 10} and all(len(row) <= 2 for row in ids)
    assert s.counts()["dropped"] == s.counts()["sources"][0]["empty"] > 0
    assert f"0 dropped with more than 512 tokens, {s.empty[0]} without any" in s.report()
    again = stream(path, tok=tokenizer(post=post), prompts_per_step=2)
    again.load_state_dict(s.state_dict())
    assert again.empty == s.empty
    refusing = stream(path, tok=tokenizer(post=post), config={"overlong": "error"})
    with pytest.raises(ValueError, match="row [02]: the prompt has no tokens; give it some text"):
        refusing.next_batch()


def test_a_dataset_without_tokens_is_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": ""}] * 3)
    with pytest.raises(ValueError, match="no token of any of its 3 prompts; check actor.tokenizer"):
        stream(path).next_batch()


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ({"prompt": [USER]}, {"chat_template": "never"}, "row 0: .*data.chat_template=auto"),
        ({"prompt": 5}, {}, "row 0: prompt='5': must be a string or a list of messages"),
        ({"prompt": []}, {}, "row 0: prompt='\\[\\]'"),
        ({"messages": [ANSWER]}, {}, "row 0: messages=.*: has no turn before the answer"),
        ({"prompt": [{"role": "user"}]}, {}, "role and content"),
        ({"prompt": [{"role": "user", "content": 5}]}, {}, "content='5': must be a text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            "content=.*image.*: has a part that is no",
        ),
        ({"prompt": [{"role": None, "content": "w1"}]}, {}, "with role and content"),
        ({"prompt": [{"role": "user", "content": [{"text": None}]}]}, {}, "a part that is no text"),
        ({"prompt": "\ud800"}, {}, "row 0: prompt: not valid Unicode"),
        ({"prompt": [USER], "tools": "[{"}, {}, "row 0: tools: not JSON"),
        ({"prompt": [USER], "tools": ["hammer"]}, {}, "tools: must be a list of JSON schemas"),
        ({"prompt": [USER], "tools": TOOLS}, {}, "does not read the tools of this row; rename"),
        ({"prompt": [SYSTEM, USER]}, {}, "row 0: the chat template refuses it: no system; mend"),
        ({"prompt": [USER]}, {"system_prompt": "be kind"}, "no system; unset data.system_prompt"),
        ({"prompt": [USER]}, {"chat_template_kwargs": {"mod": 1}}, "template_kwargs.mod: .* not r"),
    ],
)
def test_bad_prompts_are_found_before_the_first_is_drawn(tmp_path, row, config, message):
    path = write(tmp_path / "p.jsonl", [row])
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ValueError, match=message) as error:
        stream(path, tok=tokenizer(template=refusing + TEMPLATE), config=config)
    assert "\n" not in str(error.value)


def test_bad_rows_are_left_out_where_that_is_wanted(tmp_path, caplog):
    rows = [{"prompt": f"w{i}"} for i in range(8)]
    rows[3]["prompt"] = None
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match="p.jsonl, row 3: prompt='None': must be a string"):
        stream(path)
    s = stream(path, config={"bad_rows": "drop"}, prompts_per_step=7)
    assert sorted(prompts_of(s.next_batch())) == [f"w{i}" for i in range(8) if i != 3]
    assert "1 of 8 rows are left out, as" in caplog.text and s.counts()["sources"][0]["rows"] == 7
    with pytest.raises(ValueError, match="no row is any good, as .*row 0"):
        stream(write(tmp_path / "p.jsonl", [{"prompt": 1}]), config={"bad_rows": "drop"})


def test_missing_template_is_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": [USER]}])
    with pytest.raises(ValueError, match="no chat template"):
        stream(path, tok=tokenizer(template=None)).next_batch()
    with pytest.raises(ValueError, match="data.chat_template=always"):
        stream(path, tok=tokenizer(template=None), config={"chat_template": "always"})


def test_wrong_prompt_key_lists_the_columns(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question": "w1", "answer": 1}])
    message = r"data.sources.0.prompt_key=prompt: .*columns are question, answer"
    with pytest.raises(ValueError, match=message):
        stream(path)
    assert live(stream(path, key="question", prompts_per_step=1).next_batch()) == [9]


# Length


def test_overlong_prompts_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "w1 " * n, "n": n} for n in (1, 2, 3, 4, 5)]
    s = stream(write(tmp_path / "p.jsonl", rows), config={"max_prompt_tokens": 3})
    assert max(n for _ in range(5) for n in s.next_batch().columns["n"]) == 3
    counts = s.counts()
    assert counts["kept"] == 20
    assert counts["dropped"] == pytest.approx(20 * 2 / 3, abs=2)
    assert f"20 drawn, {counts['dropped']} dropped with more than 3 tokens" in s.report()


def test_overlong_error_shows_row_and_length(tmp_path):
    rows = [{"prompt": "w1"}, {"prompt": "w1 " * 9}]
    config = {"max_prompt_tokens": 3, "overlong": "error", "shuffle": False}
    with pytest.raises(ValueError, match="row 1: the prompt has 9 tokens, .*max_prompt_tokens=3"):
        stream(write(tmp_path / "p.jsonl", rows), config=config).next_batch()


def test_a_dataset_of_overlong_prompts_ends(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "w1 w2 w3"}] * 5)
    with pytest.raises(ValueError, match="all its 5 prompts have more tokens than"):
        stream(path, config={"max_prompt_tokens": 2}).next_batch()


def test_the_only_short_prompt_is_found_across_epochs(tmp_path):
    rows = [{"prompt": "w1 w2 w3"}] * 7 + [{"prompt": "w4"}]
    s = stream(write(tmp_path / "p.jsonl", rows), config={"max_prompt_tokens": 2})
    for _ in range(5):
        assert prompts_of(s.next_batch()) == ["w4"] * 4


# Readers


ROWS = [{"prompt": "w1", "label": "a"}, {"prompt": "w2, \u2028w3", "label": "b"}]


def write_as(path, rows):
    if path.suffix == ".jsonl":
        write(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_readers_agree(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    write_as(path, ROWS)
    rows = read_rows(SourceConfig(path=str(path)))
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert columns_of(rows) == ["prompt", "label"]


def test_parquet_keeps_messages(tmp_path):
    path = tmp_path / "chat.parquet"
    write_as(path, [{"prompt": [USER]}])
    assert live(stream(str(path), prompts_per_step=1).next_batch()) == CHAT


def test_folder_joins_its_files_by_name(tmp_path):
    (tmp_path / "b").mkdir()
    write_as(tmp_path / "b" / "2.csv", ROWS[1:])
    write_as(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    rows = read_rows(SourceConfig(path=str(tmp_path)))
    assert [rows[i] for i in range(len(rows))] == ROWS


def test_text_file_is_one_prompt_per_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"w1 w2\r\n\n  w3\n")
    rows = read_rows(SourceConfig(path=str(path), prompt_key="question"))
    assert rows == [{"question": "w1 w2"}, {"question": "  w3"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "line 2: must be an object"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', r"name it \.jsonl"),
        ("p.json", '{"prompt": "a"}', "must be a list of objects"),
        ("p.csv", "prompt,label\na,b,c\n", "line 2: not 2 cells"),
        ("p.csv", "prompt,label\na\n", "line 2: not 2 cells"),
        ("p.md", "text", "cannot read '.md'"),
        ("p.jsonl", "\n", "has no rows"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(SourceConfig(path=str(tmp_path / name)))


def test_missing_files_and_packages(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such data file"):
        read_rows(SourceConfig(path="prompts.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file in it ends in"):
        read_rows(SourceConfig(path=str(tmp_path / "empty")))
    (tmp_path / "p.parquet").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'gearshift\[parquet\]'"):
        read_rows(SourceConfig(path=str(tmp_path / "p.parquet")))
    with pytest.raises(ValueError, match=r"pip install 'gearshift\[data\]'"):
        read_rows(SourceConfig(path="someone/prompts"))


def test_an_asset_that_was_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="run: gearshift fetch movie-prompts"):
        read_rows(SourceConfig(path="asset:movie-prompts"))


# Pretraining text


def texts(tmp_path, count: int = 20) -> PretrainConfig:
    rows = [{"text": " ".join(f"w{i}" for _ in range(1 + i % 5))} for i in range(count)]
    path = write(tmp_path / "t.jsonl", rows)
    source = SourceConfig(path=path, prompt_key="text")
    return PretrainConfig(sources=[source], max_tokens=8, rows=4)


def test_text_is_packed_end_to_end(tmp_path):
    s = TextStream(texts(tmp_path), tokenizer(post="<s> $A </s>"), 0)
    tokens = torch.cat([s.next_batch() for _ in range(3)]).flatten().tolist()
    assert len(tokens) == 3 * 4 * 8
    documents, current = [], []
    for token in tokens:
        if token == 1:
            documents.append(current)
            current = []
        else:
            current.append(token)
    assert len(documents) >= 20
    first_epoch = documents[:20]
    assert sorted(d[0] - 8 for d in first_epoch) == list(range(20))
    assert all(d == [d[0]] * (1 + (d[0] - 8) % 5) for d in first_epoch)


def test_text_does_not_depend_on_world_size(tmp_path):
    config, tok = texts(tmp_path), tokenizer()
    alone = TextStream(config, tok, 7)
    ranks = [TextStream(config, tok, 7, rank=r, world_size=2) for r in range(2)]
    for _ in range(3):
        parts = [s.next_batch() for s in ranks]
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), alone.next_batch())


def test_text_resumes_exactly(tmp_path):
    config, tok = texts(tmp_path), tokenizer()
    straight = TextStream(config, tok, 7)
    straight.next_batch()
    state = json.loads(json.dumps(straight.state_dict()))
    assert state["left_over"]  # the cut falls inside a document
    resumed = TextStream(config, tok, 7)
    resumed.load_state_dict(state)
    for _ in range(3):
        assert torch.equal(resumed.next_batch(), straight.next_batch())
    with pytest.raises(ValueError, match="seed=8"):
        TextStream(config, tok, 8).load_state_dict(state)


def test_text_errors(tmp_path):
    config = texts(tmp_path)
    with pytest.raises(ValueError, match="no end token"):
        TextStream(config, tokenizer(eos_token=None, pad_token=None), 0)
    wrong = PretrainConfig(sources=[SourceConfig(path=config.sources[0].path)])
    with pytest.raises(
        ValueError, match="pretrain.sources.0.prompt_key=prompt: .*columns are text"
    ):
        TextStream(wrong, tokenizer(), 0)
    path = write(tmp_path / "n.jsonl", [{"text": 3}])
    number = PretrainConfig(sources=[SourceConfig(path=path, prompt_key="text")])
    with pytest.raises(ValueError, match="row 0: text='3': must be a string"):
        TextStream(number, tokenizer(), 0).next_batch()
    path = write(tmp_path / "e.jsonl", [{"text": ""}])
    empty = PretrainConfig(sources=[SourceConfig(path=path, prompt_key="text")])
    with pytest.raises(ValueError, match="all its 1 texts are empty"):
        TextStream(empty, tokenizer(), 0).next_batch()


# Weights of rows


def weighted(path, weights, **row) -> str:
    rows = [{"prompt": f"w{i}", "answer": i, "w": w} | row for i, w in enumerate(weights)]
    return write(path, rows)


def weighted_stream(path: str, **changes):
    source = SourceConfig(path=path, weight_key="w", **changes.pop("source", {}))
    data = DataConfig(sources=[source], **changes.pop("config", {}))
    return PromptStream(data, tokenizer(), **{"prompts_per_step": 4} | changes)


def test_an_epoch_draws_rows_in_proportion_to_their_weights(tmp_path):
    """Four draws in shares of 0, 1, 1 and 2; and of 1000 rows of random weights, to one draw."""
    s = weighted_stream(weighted(tmp_path / "a.jsonl", [0, 1, 1, 2]))
    epochs = [s.next_batch().columns["answer"] for _ in range(6)]
    assert all(sorted(epoch) == [1, 2, 3, 3] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1

    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(1000, generator=generator, dtype=torch.float64)
    many = weighted(tmp_path / "b.jsonl", weights.tolist())
    drawn = weighted_stream(many, prompts_per_step=1000).next_batch().columns["answer"]
    counts = torch.bincount(torch.tensor(drawn), minlength=1000)
    share = 1000 * weights / weights.sum()
    assert ((counts - share).abs() < 1).all()


def test_a_weighted_order_is_resumed_and_other_weights_are_refused(tmp_path):
    path = weighted(tmp_path / "a.jsonl", [1, 5, 2, 2, 1, 1])
    s = weighted_stream(path)
    for _ in range(3):
        s.next_batch()
    state, following = s.state_dict(), s.next_batch().columns["answer"]
    again = weighted_stream(path)
    again.load_state_dict(state)
    assert again.next_batch().columns["answer"] == following
    other = weighted_stream(weighted(tmp_path / "b.jsonl", [1, 4, 2, 2, 1, 1]))
    with pytest.raises(ValueError, match="its 6 rows are not the 6 of the checkpoint"):
        other.load_state_dict(state)


@pytest.mark.parametrize("weight", [-1, float("nan"), None, True, "much", float("inf")])
def test_a_row_without_a_weight_is_named(tmp_path, weight):
    path = weighted(tmp_path / "a.jsonl", [1, weight])
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: w=.*: must be a number from 0 on"):
        weighted_stream(path)


def test_weights_that_cannot_be_used(tmp_path):
    path = weighted(tmp_path / "a.jsonl", [0, 0])
    with pytest.raises(ValueError, match="every row has w=0"):
        weighted_stream(path)
    path = weighted(tmp_path / "b.jsonl", [1, 2])
    with pytest.raises(ValueError, match=r"weight_key=w: needs data\.shuffle"):
        weighted_stream(path, config={"shuffle": False})
    (tmp_path / "c.csv").write_text("prompt,w\nw1,0.5\nw2,1.5\n")
    drawn = weighted_stream(str(tmp_path / "c.csv")).next_batch()
    assert sorted(prompts_of(drawn)) in (["w1", "w2", "w2", "w2"], ["w1", "w1", "w2", "w2"])


def test_weights_of_the_rows_that_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": 7}, {"prompt": "w1", "w": 1}])
    s = weighted_stream(path, config={"bad_rows": "drop"})
    assert prompts_of(s.next_batch()) == ["w1"] * 4


def test_ranks_share_the_look_at_all_rows(tmp_path):
    """Each row is looked at once; then all ranks know what one rank by itself finds."""
    rows = write(tmp_path / "p.jsonl", [{"prompt": i} for i in range(31)])
    found = {}
    for ranks in (1, 2):
        (out := tmp_path / str(ranks)).mkdir()
        found[ranks] = on_ranks.lines("data/sift_on_ranks.py", ranks, out, rows)
    ((alone, stopped),) = found[1]
    assert alone["left"] == [i for i in range(31) if i % 5 != 3]
    assert stopped["told"] == f"{rows}, row 3: prompt: is of the wrong sort"
    for dropped, refused in found[2]:
        assert dropped["left"] == alone["left"] and refused["told"] == stopped["told"]
    shares = [dropped["looked"] for dropped, _ in found[2]]
    assert sorted(shares[0] + shares[1]) == list(range(31)) and min(map(len, shares)) == 15
