"""What a reward reads: the text of a rollout's rows, and a reward model's own tokens for it."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from gearshift.engine.batch import AS_READ, Rollout
from gearshift.engine.config.errors import ConfigError

Message = dict[str, Any]  # {"role": ..., "content": ...}


class RewardError(ValueError):
    """A reward that cannot be used or gave no usable score; one line that names it."""


@dataclass(frozen=True)
class Answer:
    """One reward's scores of this rank's rows: NaN where it has none, and why, by row.

    tokens: by row, the rewards of its tokens where the score is their sum.
    """

    scores: list[float]
    faults: dict[int, RewardError]
    tokens: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """A rollout as lists, one entry per row."""

    prompts: list[str | list[Message]]  # as in the dataset: a string, or a list of messages
    as_read: list[str | dict[str, Any]]  # what the policy's template was given; else the string
    responses: list[str]  # without special tokens and without the end token
    prompt_ids: list[list[int]]  # live tokens only
    response_ids: list[list[int]]  # live tokens only, the end token included
    finished: list[bool]
    columns: dict[str, list[Any]]  # the dataset's other columns

    @property
    def completions(self) -> list[str | list[Message]]:
        """In TRL's form: a string; one assistant message in a list where the prompt is a chat."""
        return [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(self.prompts, self.responses, strict=True)
        ]

    def row(self, i: int) -> str:
        """Row i for an error message, shortened."""
        return f"prompt {_shorten(self.prompts[i])}, completion {_shorten(self.responses[i])}"


def read_rows(rollout: Rollout, tokenizer: Any) -> TextRows:
    """Decodes a rollout with the policy's tokenizer.

    The column "prompt" is the prompt as the dataset had it; without one, the prompt's tokens are
    decoded. AS_READ is for reward models alone: a function's columns are the dataset's.
    """
    prompt_ids = _live(rollout.prompt_ids, rollout.prompt_mask)
    response_ids = _live(rollout.response_ids, rollout.response_mask)
    finished = rollout.finished.tolist()
    columns = dict(rollout.columns)
    prompts = columns.pop("prompt", None)
    if prompts is None:
        prompts = [decode(tokenizer, ids) for ids in prompt_ids]
    as_read = columns.pop(AS_READ, None) or [
        {"conversation": prompt} if isinstance(prompt, list) else prompt for prompt in prompts
    ]
    bodies = [
        # An end token that is not marked special would otherwise be read as text.
        ids[:-1] if done and ids[-1] == tokenizer.eos_token_id else ids
        for ids, done in zip(response_ids, finished, strict=True)
    ]
    return TextRows(
        prompts=prompts,
        as_read=as_read,
        responses=[decode(tokenizer, ids) for ids in bodies],
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        finished=finished,
        columns=columns,
    )


def decode(tokenizer: Any, token_ids: list[int]) -> str:
    """Text without special tokens, its spaces untouched."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=16)  # comparing two large vocabularies takes a tenth of a second
def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether a token id, and a chat, mean the same to both."""
    return first is second or (
        first.chat_template == second.chat_template and first.get_vocab() == second.get_vocab()
    )


def render_for_reward(
    rows: TextRows, policy_tokenizer: Any, reward_tokenizer: Any, *, chat_template: bool
) -> list[list[int]]:
    """Token ids of prompt and response for a reward model, which is read at the last token.

    The tokenizers agree (vocabulary and chat template): the ids that the policy saw and sampled,
    never tokenised again. Only a chat with chat_template=False is rendered as below even then.

    They differ: the text is rendered and tokenised with the reward model's own tokenizer. A chat is
    what the policy's template read: a string wrapped as one counts, and so does its system prompt.
      - A chat, chat_template=True and the tokenizer has a template: that template. A finished
        response is closed as the template closes a turn; one cut by length stays open.
      - Otherwise plain text: the contents of the messages, a blank line between them, or prompt and
        response run together. A finished response ends with the reward tokenizer's end token, if
        it has one; one cut by length does not.
    """
    same = same_tokenizer(policy_tokenizer, reward_tokenizer)
    templated = chat_template and reward_tokenizer.chat_template is not None
    rendered = []
    for i, prompt in enumerate(rows.as_read):
        is_chat = isinstance(prompt, dict)
        if same and (chat_template or not is_chat):
            rendered.append(rows.prompt_ids[i] + rows.response_ids[i])
        elif is_chat and templated:
            try:
                rendered.append(_render_chat(rows, i, reward_tokenizer))
            except Exception as error:  # a template may raise anything
                what = (
                    f"the reward model's chat template refuses it: {' '.join(str(error).split())}"
                )
                fix = "set its chat_template to false, or mend the row"
                raise RewardError(f"{what}; {fix}; {rows.row(i)}") from None
        else:
            rendered.append(_render_plain(rows, i, reward_tokenizer))
    return rendered


def check_system_turn(policy_tokenizer: Any, reward_tokenizer: Any) -> None:
    """Raises ConfigError where the reward model's template takes no system message."""
    if reward_tokenizer.chat_template is None or same_tokenizer(policy_tokenizer, reward_tokenizer):
        return
    chat = [{"role": role, "content": "a"} for role in ("system", "user")]
    try:
        reward_tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise ConfigError(
            "chat_template",
            f"its tokenizer's template takes no data.system_prompt ({error})",
            "set it to false, or put the instruction into the prompts",
            value="true",
        ) from None


def plain_prompt(prompt: str | dict[str, Any]) -> str:
    """A prompt without a template: a chat's contents, a blank line after all but a begun answer."""
    if isinstance(prompt, str):
        return prompt
    *before, last = prompt["conversation"]
    text = "".join(f"{turn['content'] or ''}\n\n" for turn in (*before, last))
    return text.removesuffix("\n\n") if last["role"] == "assistant" else text


def _render_chat(rows: TextRows, i: int, tokenizer: Any) -> list[int]:
    given: Any = rows.as_read[i]
    *before, last = given["conversation"]
    begun = last["role"] == "assistant"
    if rows.finished[i]:
        before, start = (before, last["content"]) if begun else ([*before, last], "")
        chat = [*before, {"role": "assistant", "content": start + rows.responses[i]}]
        text = tokenizer.apply_chat_template(**given | {"conversation": chat}, tokenize=False)
    else:
        opening = tokenizer.apply_chat_template(
            **given, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
        text = opening + rows.responses[i]
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render_plain(rows: TextRows, i: int, tokenizer: Any) -> list[int]:
    ids = tokenizer(plain_prompt(rows.as_read[i]) + rows.responses[i])["input_ids"]
    end = tokenizer.eos_token_id
    # Some tokenizers append their end token to every text; a cut response must not show one.
    while end is not None and ids and ids[-1] == end:
        ids = ids[:-1]
    return [*ids, end] if rows.finished[i] and end is not None else ids


def _live(ids: Any, mask: Any) -> list[list[int]]:
    table, live = ids.tolist(), mask.tolist()
    return [
        [token for token, keep in zip(row, kept, strict=True) if keep]
        for row, kept in zip(table, live, strict=True)
    ]


def _shorten(value: Any, limit: int = 200) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[: limit - 40]} ... {text[-35:]}"
