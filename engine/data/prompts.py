"""One dataset row -> the token ids of a prompt: formats, chat template, special tokens."""

import json
from dataclasses import dataclass
from typing import Any

from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.schema import DataConfig
from gearshift.engine.data.readers import Row, require_unicode

Message = dict[str, Any]
Prompt = str | list[Message]


@dataclass(frozen=True)
class PromptText:
    """A prompt as the dataset had it, and as the model reads it."""

    prompt: Prompt
    as_read: str | dict[str, Any]  # what the chat template was given; the string without one
    rendered: str

    @property
    def templated(self) -> bool:
        return isinstance(self.as_read, dict)


class PromptEncoder:
    """Applies the chat template once and tokenises once.

    Formats of a row: {key: "text"}, {key: [messages]}, {"messages": [...]}; messages may be a text
    that is their JSON, since CSV has no lists. A last turn of the
    assistant is continued in a column called `prompt`, as in TRL; in any other it is the answer,
    which is dropped. A column `tools` goes to the template. A templated prompt is tokenised without
    further special tokens. A plain string gets those of its tokenizer, but never an end token, nor
    a BOS token where it begins with one.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, ids: int | None = None):
        """ids: that the model has rows for; None: all of the tokenizer's."""
        self.config, self.tokenizer = config, tokenizer
        self.ids = ids if ids is not None and ids < len(tokenizer) else None
        end = tokenizer.eos_token_id
        self.appends_end = end is not None and tokenizer("a")["input_ids"][-1:] == [end]
        begin = tokenizer.bos_token_id
        self.adds_begin = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
        self.added = len(tokenizer("")["input_ids"])  # what every text gets, special tokens alone
        if config.chat_template == "always":
            self._require_template("data.chat_template=always")
        for name in config.chat_template_kwargs:
            unread = name not in str(tokenizer.chat_template)
            problem = "the chat template does not read it"
            refuse_if(unread, f"data.chat_template_kwargs.{name}", problem)

    def read(self, row: Row, key: str) -> PromptText:
        """Raises ConfigError for a row without a prompt, and where the chat template refuses it."""
        source = "messages" if key not in row and "messages" in row else key
        prompt = _from_json(row.get(source))
        if source != "prompt" and _is_chat(prompt) and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        as_read: Any = prompt
        if isinstance(prompt, str) and self.config.chat_template == "always":
            as_read = self._arguments([{"role": "user", "content": prompt}], row)
        elif _is_chat(prompt):
            as_read = self._arguments([_as_text(turn) for turn in prompt], row)
        elif not isinstance(prompt, str):
            problem = "must be a string or a list of messages with role and content"
            if prompt == [] != row[source]:
                problem = "has no turn before the answer"
            raise ConfigError(source, problem, value=repr(str(row.get(source))[:60]))
        rendered = as_read if isinstance(as_read, str) else self._render(as_read)
        require_unicode(rendered, key)
        text = PromptText(prompt, as_read, rendered)
        if self.ids is not None:
            require_rows(self.encode(text), self.ids, source, rendered)
        return text

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

    def _arguments(self, messages: list[Message], row: Row) -> dict[str, Any]:
        """What the chat template is given."""
        system, tools = self.config.system_prompt, row.get("tools")
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        given = {**self.config.chat_template_kwargs, "conversation": messages}
        if isinstance(tools, str):  # as many datasets keep what has no common schema
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise ConfigError("tools", f"not JSON: {error}") from None
        wrong = tools and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools))
        refuse_if(wrong, "tools", "must be a list of JSON schemas", "rename the column")
        unread = tools and "tools" not in str(self.tokenizer.chat_template)
        problem = "the chat template does not read the tools of this row"
        refuse_if(unread, "tools", problem, "rename the column, or use a template that does")
        return given | ({"tools": tools} if tools else {})

    def _render(self, given: dict[str, Any]) -> str:
        if self.config.chat_template == "never":
            raise ConfigError("", "the prompt is a chat", "set data.chat_template=auto")
        self._require_template("the prompt is a chat")
        try:
            begun = given["conversation"][-1]["role"] == "assistant"  # and goes on in its turn
            return self.tokenizer.apply_chat_template(
                **given,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # a template may raise anything
            problem = f"the chat template refuses it: {' '.join(str(error).split())}"
            system = self.config.system_prompt is not None
            fix = "unset data.system_prompt if that is it" if system else "mend the row"
            raise ConfigError("", problem, f"{fix}, or data.bad_rows=drop") from None

    def _require_template(self, reason: str) -> None:
        if self.tokenizer.chat_template is None:
            problem = f"{reason}, but the tokenizer has no chat template"
            fix = "set actor.tokenizer to one that has, or use string prompts"
            raise ConfigError("", problem, fix)


def require_rows(ids: list[int], count: int, key: str, text: str) -> None:
    """Raises ConfigError where a text has a token beyond the model's: Gemma 3's tokenizer has one
    for images that its models of text have no row for."""
    most = max(ids, default=0)
    problem = f"the tokenizer makes id {most} of it, and the model has rows for {count}"
    refuse_if(most >= count, key, problem, value=repr(text[:60]))


def _from_json(prompt: Any) -> Any:
    """The messages, where a text is the JSON of messages; else what was given."""
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("["):
        return prompt
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):  # a text of a thousand brackets is no JSON that is read
        return prompt
    return found if _is_chat(found) else prompt


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(turn, dict) and "content" in turn for turn in prompt)
        and all(isinstance(turn.get("role"), str) for turn in prompt)
    )


def _as_text(turn: Message) -> Message:
    """The same turn; a content of several parts, which few templates read, as one text."""
    content = turn["content"]
    if not isinstance(content, list):
        wrong = not isinstance(content, str) and not turn.get("tool_calls")
        refuse_if(wrong, "content", "must be a text", value=repr(str(content)[:60]))
        return turn
    texts: list[Any] = [part.get("text") for part in content if isinstance(part, dict)]
    wrong = len(texts) < len(content) or not all(isinstance(text, str) for text in texts)
    refuse_if(wrong, "content", "has a part that is no text", value=repr(content)[:60])
    return {**turn, "content": "".join(texts)}
