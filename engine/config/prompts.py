"""The sections that say what is read and how responses are drawn: datasets, prompts, sampling.

schema.py has the others, and hands these on.
"""

from typing import Literal

from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.keys import Flag, Number, Options, Parts, Whole, knob, section


@section
class SourceConfig:
    """One dataset."""

    path: str = knob("", "json, jsonl, csv or parquet file, directory of them, or hub id")
    split: str = knob("train", "split of a hub dataset")
    config: str | None = knob(None, "configuration of a hub dataset")
    prompt_key: str = knob(
        "prompt",
        "column of the prompt: a string or a list of messages (or its JSON). A last turn of the "
        "assistant is continued in a column `prompt`; in any other it is the answer, which is "
        "dropped",
    )
    weight: Number = knob(1.0, "share of the prompts drawn from this dataset", gt=0)
    weight_key: str | None = knob(
        None,
        "column of row weights, numbers from 0 on: an epoch, which has as many draws as there are "
        "rows, draws each in proportion (a curriculum); null: each once",
    )


@section
class DataConfig:
    """Prompts."""

    sources: Parts[SourceConfig] = knob([], "datasets, mixed by their weights")
    max_prompt_tokens: Whole = knob(512, "longest prompt, after the chat template", ge=1)
    overlong: Literal["drop", "error"] = knob(
        "drop", "what to do with longer prompts, and with those of no tokens"
    )
    chat_template: Literal["auto", "always", "never"] = knob(
        "auto", "auto: templates messages only; always: wraps a string as one user message"
    )
    chat_template_kwargs: Options = knob(
        {}, "further variables of the template, as enable_thinking"
    )
    bad_rows: Literal["refuse", "drop"] = knob(
        "refuse", "rows that are no prompt, or that the chat template refuses; drop is said"
    )
    system_prompt: str | None = knob(None, "put before every chat that has no system message")
    shuffle: Flag = knob(True, "a new order every epoch, from the run's seed")


@section
class PretrainConfig:
    """The pretraining stream of PPO-ptx (Ouyang et al. 2022)."""

    sources: Parts[SourceConfig] = knob([], "text datasets; `prompt_key` names the text column")
    max_tokens: Whole = knob(512, "tokens per row; documents are packed end to end", ge=2)
    rows: Whole = knob(8, "rows per optimizer step, over all ranks", ge=1)


@section
class SamplingConfig:
    """How responses are drawn. PPO's log-probs are of this temperature."""

    max_new_tokens: Whole = knob(
        512, "longest response; one that reaches it counts as cut, not finished", ge=1
    )
    temperature: Number = knob(1.0, "divides the logits; 0 is greedy, for evaluation only", ge=0)
    top_k: Whole = knob(0, "0: off. Training wants 0: a truncated policy biases the ratio", ge=0)
    top_p: Number = knob(1.0, "1: off. Training wants 1, as above", gt=0, le=1)
    stop: list[str] = knob([], "strings that end a response; kept in it")
    min_new_tokens: Whole = knob(0, "tokens before which nothing ends a response", ge=0)
    suppress_tokens: list[Whole] = knob([], "token ids that are never drawn")
    limit_key: str | None = knob(
        None, "dataset column of a prompt's own longest response, below max_new_tokens"
    )

    def __post_init__(self):
        refuse_if("" in self.stop, "stop", "an empty string ends every response", value=self.stop)
        problem, least = f"more than max_new_tokens={self.max_new_tokens}", self.min_new_tokens
        refuse_if(least > self.max_new_tokens, "min_new_tokens", problem, value=least)
