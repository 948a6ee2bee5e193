"""What is said of a run before its models load."""

from dataclasses import replace

import pytest

from gearshift.engine import assemble
from tests.tiny import run as tiny_run


@pytest.mark.parametrize(
    ("zero", "world_size", "named"),
    [("zero3", 1, ["actor", "critic"]), ("zero3", 2, []), ("zero0", 1, [])],
)
def test_zero3_at_one_rank_is_said_to_be_slow(tmp_path, zero, world_size, named):
    config = tiny_run.config(tiny_run.write_models(tmp_path), zero)
    config = replace(config, data=replace(config.data, max_prompt_tokens=16))
    said = assemble.slower_than_need_be(assemble.draw_up(config), world_size)
    assert [text.split(".deepspeed=")[0] for text in said] == named
    assert all("trained_zero1_bf16_split.json" in text and "\n" not in text for text in said)
