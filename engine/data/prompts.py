"""One dataset row -> the token ids of a prompt: formats, chat template, special tokens."""

from dataclasses import dataclass
from typing import Any

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import DataConfig
from gearshift.engine.data.readers import Row

Message = dict[str, Any]
Prompt = str | list[Message]


@dataclass(frozen=True)
class PromptText:
    """A prompt as the dataset had it, and as the model reads it."""

    prompt: Prompt
    as_read: Prompt  # the messages that were templated, system turn included; else the string
    rendered: str

    @property
    def templated(self) -> bool:
        return isinstance(self.as_read, list)


class PromptEncoder:
    """Applies the chat template once and tokenises once.

    Formats of a row: {key: "text"}, {key: [messages]}, {"messages": [...]}; of the last, the answer
    in a trailing assistant turn is dropped. A templated prompt is tokenised without further special
    tokens. A plain string gets those of its tokenizer, but never an end token, nor a BOS token
    where it begins with one.
    """

    def __init__(self, config: DataConfig, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        end = tokenizer.eos_token_id
        self.appends_end = end is not None and tokenizer("a")["input_ids"][-1:] == [end]
        begin = tokenizer.bos_token_id
        self.adds_begin = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
        self.added = len(tokenizer("")["input_ids"])  # what every text gets, special tokens alone
        if config.chat_template == "always":
            self._require_template("data.chat_template=always")

    def read(self, row: Row, key: str) -> PromptText:
        """Raises ConfigError for a row without a prompt."""
        if key not in row and "messages" in row:
            prompt = _without_answer(row["messages"])
        else:
            prompt = row.get(key)
        if isinstance(prompt, str):
            as_chat = self.config.chat_template == "always"
            messages = [{"role": "user", "content": prompt}] if as_chat else None
        elif _is_chat(prompt):
            messages = prompt
        else:
            problem = "must be a string or a list of messages with role and content"
            raise ConfigError(key, problem, value=repr(str(prompt)[:60]))
        if messages is None:
            return PromptText(prompt, prompt, prompt)
        messages = self._with_system(messages)
        return PromptText(prompt, messages, self._render(messages))

    def encode(self, text: PromptText) -> list[int]:
        """Token ids; none where the tokenizer makes nothing of the text."""
        ids = self.tokenizer(text.rendered, add_special_tokens=not text.templated)["input_ids"]
        if not text.templated and len(ids) <= self.added:
            return []
        if not text.templated and self.appends_end:
            ids = ids[:-1]
        if not text.templated and self.adds_begin and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        return ids

    def _with_system(self, messages: list[Message]) -> list[Message]:
        system = self.config.system_prompt
        if system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _render(self, messages: list[Message]) -> str:
        if self.config.chat_template == "never":
            raise ConfigError("", "the prompt is a chat", "set data.chat_template=auto")
        self._require_template("the prompt is a chat")
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _require_template(self, reason: str) -> None:
        if self.tokenizer.chat_template is None:
            problem = f"{reason}, but the tokenizer has no chat template"
            fix = "set actor.tokenizer to one that has, or use string prompts"
            raise ConfigError("", problem, fix)


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in prompt)
    )


def _without_answer(messages: Any) -> Any:
    if _is_chat(messages) and messages[-1]["role"] == "assistant":
        return messages[:-1]
    return messages
