"""The demo's reward: sentiment by VADER's lexicon (Hutto and Gilbert 2014).

Use it as `function: gearshift.launch.sentiment:sentiment`.
"""

from functools import cache
from typing import Any

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError as missing:
    raise ValueError(
        "gearshift.launch.sentiment needs vaderSentiment: pip install 'gearshift[demo]'"
    ) from missing


def sentiment(prompts: list, completions: list, **columns: Any) -> list[float]:
    """VADER's compound score, -1 to 1, of prompt and completion read as one text."""
    return [_compound(_text(p) + _text(c)) for p, c in zip(prompts, completions, strict=True)]


def sentiment_of_completion(completions: list, **columns: Any) -> list[float]:
    """VADER's compound score, -1 to 1, of the completion alone."""
    return [_compound(_text(completion)) for completion in completions]


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def _compound(text: str) -> float:
    return _analyzer().polarity_scores(text)["compound"]


def _text(entry: str | list[dict[str, Any]]) -> str:
    """A string, or the contents of a chat's user and assistant messages, one a line."""
    if isinstance(entry, str):
        return entry
    return "".join(f"{turn['content']}\n" for turn in entry if turn["role"] != "system")
