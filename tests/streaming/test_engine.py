"""Streamed scoring: the scores of weights that stay, each weight brought once per pass."""

import json
import shutil
import threading
from collections import namedtuple
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from gearshift.engine.config import deepspeed as ds_config
from gearshift.engine.config.schema import ModelConfig
from gearshift.engine.models import load as models
from gearshift.engine.models.heads import Policy, ScoreModel
from gearshift.engine.models.reading import lay_out
from gearshift.engine.roles import frozen_engine
from gearshift.engine.streaming.lockstep import Lockstep
from tests.tiny import models as tiny
from tests.tiny import on_ranks
from tests.tiny.run import alone

FEW = "policy:policy:host,bert:reward:disk"
ALL = f"{FEW},tied:policy:host,renamed:policy:disk,policy:policy:disk,reward:reward:host"
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}
WHOLE = {"zero_optimization": {"stage": 0}}
# Scores of order 1 after three layers of four products each, sums of 32 terms at most. A product's
# order of summation depends on where its operands lie in memory (MKL): no two need be equal bits.
ROUNDING = 3 * 4 * 32 * 2.0**-24
ROW = {"error", "ratio", "passes", "verified", "least over part", "held"}


def load(path: ModelConfig, role: str, ds: dict | None = None):
    """A module of a frozen role, its weights in host memory, or where `ds` says."""
    ds = ds or ds_config.load("frozen_zero3_cpu")
    return models.load_model(path, role, ds, store=models.room_for(path, role, ds))


def host_engine(path: ModelConfig, role: str):
    wrap = Policy if role == "policy" else ScoreModel
    return frozen_engine(wrap(load(path, role)), ds_config.load("frozen_zero3_cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    tiny.save_policy(directory / "policy")
    tiny.save_policy(directory / "tied", tie_word_embeddings=True)
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "head_dim": 32}
    tiny.save_policy(directory / "wide", **wide)
    tiny.save_reward(directory / "reward")
    torch.manual_seed(5)
    mixtral = AutoConfig.for_model("mixtral", **SIZES, num_key_value_heads=2, num_local_experts=2)
    AutoModelForCausalLM.from_config(mixtral).save_pretrained(directory / "renamed")
    bert = AutoConfig.for_model("bert", **SIZES, num_labels=1)
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(directory / "bert")
    (directory / "disk").mkdir()
    return directory


@pytest.fixture(scope="module", params=(1, pytest.param(2, marks=pytest.mark.bits), 4))
def rows(request, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"out{request.param}")
    place = (str(folder), str(folder / "disk"), ALL if request.param == 2 else FEW)
    return on_ranks.lines("streaming/engine_on_ranks.py", request.param, out, *place)


def test_streamed_scores_are_those_of_resident_weights(rows):
    for rank in rows:
        for row in rank[:-4]:
            assert row["error"] <= ROUNDING, row


def test_every_weight_comes_once_per_pass(rows):
    for rank in rows:
        for row in rank[:-4]:
            assert set(row) == ROW | {"case"}
            assert row["ratio"] == 1.0, row
            verified = 4 if "policy" in row["case"].split()[1] else 0  # models.heads.verify_head
            assert (row["passes"], row["verified"]) == (2, verified)
            assert 1.0 <= row["least over part"] < 1.2  # padding of tiny parameters
            assert row["held"] == 0  # nothing stays on the device


def test_the_device_and_the_host_hold_what_is_planned(rows):
    """Two layers and the forwards of a pass; a model's own part, or two layers of it."""
    for rank in rows:
        for row in rank[-4:-1]:
            assert row["device"] == pytest.approx(row["device planned"], rel=0.05), row
            assert row["host"] == pytest.approx(row["host planned"], rel=0.05), row
            assert row["device"] < 0.65 * row["whole"]


def test_a_rank_that_fails_ends_the_others(rows):
    *others, failed = [rank[-1] for rank in rows]
    assert failed["told"] == "ZeroDivisionError"
    for row in others:
        assert row["told"].endswith("Error") and row["told"] != "ZeroDivisionError", row


def test_nothing_is_left_on_the_disk(rows, folder):
    assert not list((folder / "disk").iterdir())


def test_calls_stop_where_they_wait_and_run_one_at_a_time():
    order, running = [], threading.Lock()

    def call(number):
        for index in range(3):
            assert running.acquire(blocking=False)
            order.append((index, number))
            running.release()
            together.wait_for(index)
        return number * 10

    together = Lockstep([lambda n=n: call(n) for n in range(3)], torch.no_grad)
    brought = []
    assert together.run(brought.append) == [0, 10, 20]
    assert brought == [0, 1, 2]
    assert order == [(index, number) for index in range(3) for number in range(3)]


def test_a_call_that_fails_unwinds_the_others():
    unwound = []

    def waits():
        try:
            together.wait_for(1)
        finally:
            unwound.append(1)

    def fails():
        together.wait_for(0)
        raise ValueError("mine")

    threads = threading.active_count()
    together = Lockstep([waits, fails, waits], torch.no_grad)
    with pytest.raises(ValueError, match="mine"):
        together.run(lambda index: None)
    assert unwound == [1, 1]
    assert threading.active_count() == threads


@pytest.mark.bits
def test_an_engine_works_after_a_failed_pass(folder):
    with alone():
        engine = host_engine(ModelConfig(path=str(folder / "policy")), "policy")
        ids = torch.arange(3, 9)[None]
        reading, places = lay_out(ids, torch.ones_like(ids, dtype=torch.bool), packs=True)

        def head(hidden, weight, bias):
            return hidden @ weight.T

        inputs = (reading, places[0, -3:-1])
        before = engine(*inputs, head)
        with pytest.raises(ZeroDivisionError):
            engine(*inputs, lambda *_: 1 / 0)
        assert torch.equal(engine(*inputs, head), before)


def test_a_full_disk_is_told_before_the_model_is_loaded(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    settings = ds_config.load("frozen_zero3_nvme")
    settings["zero_optimization"]["offload_param"]["nvme_path"] = str(folder / "disk")
    with alone(), pytest.raises(ValueError, match=r"nvme_path=\S+: 0.0 GB are free, .* needs"):
        models.room_for(ModelConfig(path=str(folder / "policy")), "policy", settings)


def test_a_spill_returns_what_was_written(folder):
    with alone():
        settings = ds_config.load("frozen_zero3_nvme")
        settings["zero_optimization"]["offload_param"]["nvme_path"] = str(folder / "disk")
        path = ModelConfig(path=str(folder / "policy"))
        store = models.room_for(path, "policy", settings)
        spilled = models.load_model(path, "policy", settings, store=store)
        held = models.load_model(path, "policy", ds_config.load("frozen_zero3_cpu"))
        store.begin(10_000)
        pairs = list(zip(spilled.parameters(), held.parameters(), strict=True))
        for ours, theirs in pairs:
            parts = [ours.stored[1]]
            assert ours.stored[0] is store and not ours.numel()
            (read,) = store.read(parts)
            assert torch.equal(read, theirs.ds_tensor.data)
            store.copied(parts)
        assert store.bytes_read == sum(ours.stored[1].nbytes for ours, _ in pairs)


FAMILIES = {
    # A group of layers that is used several times in a forward.
    "albert": SIZES | {"embedding_size": 8, "num_hidden_layers": 3},
    # A table of positions that is read where no module is called.
    "deberta-v2": SIZES
    | {"relative_attention": True, "position_buckets": 8}
    | {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "share_att_key": True},
    # The last norm comes before the layers in the tree of modules.
    "opt": {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "word_embed_proj_dim": 8, "max_position_embeddings": 64},
    "mixtral": SIZES | {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1},
}


def rows_of(ids):
    """A padded reading of whole rows, and each one's last place."""
    reading, places = lay_out(ids, torch.ones_like(ids, dtype=torch.bool), packs=False)
    return reading, places[:, -1]


@pytest.mark.bits
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_use_their_weights_unusually(family, tmp_path):
    torch.manual_seed(0)
    settings = AutoConfig.for_model(family, **FAMILIES[family], num_labels=1)
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(tmp_path)
    path = ModelConfig(path=str(tmp_path), attn="eager")
    with alone():
        resident = ScoreModel(models.load_model(path, "reward", WHOLE))
        engine = host_engine(path, "reward")
        ids = [torch.randint(3, 32, (2, 6 + i)) for i in range(3)]
        inputs = [rows_of(row) for row in ids]
        with torch.no_grad():
            expected = torch.cat([resident(*each) for each in inputs])
        before = engine.traffic
        for number in range(2):
            before = replace(engine.traffic)
            found = torch.cat(engine.together([partial(engine.module, *each) for each in inputs]))
            torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
            learned = family == "albert" and not number  # that it is used again
            assert ((engine.traffic - before).ratio == 1.0) is not learned
        assert not any(p.numel() for p in engine.module.parameters())


def test_what_a_pass_does_not_use_comes_once_at_most(folder):
    """As the vision tower of a model that reads text."""
    with alone():
        ds = ds_config.load("frozen_zero3_cpu")
        names = ("tied", "policy")
        paths = [ModelConfig(path=str(folder / name), attn="sdpa") for name in names]
        tower, lm = (models.load_model(path, "policy", ds) for path in paths)
        used = 4 * sum(p.ds_numel for p in lm.parameters())
        engine = frozen_engine(_Tower(tower, lm), ds)
        for _ in range(2):
            before = replace(engine.traffic)
            engine(torch.arange(3, 9)[None])
        last = engine.traffic - before
        assert (last.ratio, last.bytes_moved) == (1.0, used)


class _Tower(nn.Module):
    def __init__(self, tower, lm):
        super().__init__()
        self.tower, self.lm = tower, lm

    def forward(self, ids):
        return self.lm(ids).logits


def test_the_nvme_json_names_a_folder_to_be_set():
    text = json.dumps(ds_config.load("frozen_zero3_nvme"))
    assert "/local_nvme" in text
