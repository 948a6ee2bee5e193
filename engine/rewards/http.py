"""Rewards behind an HTTP endpoint.

Request: POST, JSON {"prompts": [...], "completions": [...], "columns": {name: [...]}}.
Answer: JSON {"scores": [...]}, one number per completion.
"""

import http.client
import json
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Collection
from urllib.parse import urlsplit

from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.progress import beat
from gearshift.engine.config.schema import RewardConfig
from gearshift.engine.rewards.functions import checked_scores
from gearshift.engine.rewards.text import Answer, RewardError, TextRows

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_TRANSIENT = (408, 429)  # request time-out and too many requests: the only 4xx worth another try


class HttpReward:
    """Scores from `config.urls`, used in turn; each rank begins with another one."""

    def __init__(self, config: RewardConfig):
        self.name, self.urls = config.name, list(config.urls)
        self.timeout_s, self.retries = config.timeout_s, config.retries
        self._turn = distributed.rank()
        # Its own generator: waiting must not move the run's random numbers.
        self._jitter = random.Random(distributed.rank())
        if not self.urls:
            raise RewardError(f"rewards: {self.name}: urls=[]: kind http needs at least one")
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
                raise RewardError(
                    f"rewards: {self.name}: urls: {url!r} must begin with http:// or https://"
                )

    def check(self, columns: Collection[str] | None) -> None:
        """Nothing to check before the run: an endpoint may come up later."""

    def scores(self, rows: TextRows) -> Answer:
        """One score per row, none once the retries are used up; RewardError for a refusal."""
        body = self._body(rows)
        failure = ""
        for attempt in range(self.retries + 1):
            beat()
            if attempt:
                time.sleep(self._wait_s(attempt))
            url = self.urls[self._turn % len(self.urls)]
            self._turn += 1
            try:
                answer = self._post(url, body)
            except urllib.error.HTTPError as error:
                failure = f"{url} answered {error.code} {error.reason}"
                if 400 <= error.code < 500 and error.code not in _TRANSIENT:
                    raise RewardError(
                        f"reward {self.name!r}: {failure}: {_first_line(error)}. "
                        "A refused request is not retried"
                    ) from error
            except (OSError, http.client.HTTPException) as error:
                failure = f"{url}: {type(error).__name__}: {error}"
            else:
                return self._read(url, answer, rows)
        outage = RewardError(
            f"reward {self.name!r}: no answer after {self.retries + 1} tries over "
            f"{', '.join(self.urls)}; the last: {failure}"
        )
        count = len(rows.responses)
        return Answer([math.nan] * count, dict.fromkeys(range(count), outage))

    def _body(self, rows: TextRows) -> bytes:
        for name, values in rows.columns.items():
            try:
                json.dumps(values)
            except (TypeError, ValueError):
                raise RewardError(
                    f"reward {self.name!r}: column {name!r} cannot be sent as JSON; "
                    "drop it from the dataset or convert it to text"
                ) from None
        content = {
            "prompts": rows.prompts,
            "completions": rows.completions,
            "columns": rows.columns,
        }
        # JSON has no word for NaN and infinity: they become null.
        read = json.loads(json.dumps(content), parse_constant=lambda word: None)
        return json.dumps(read, allow_nan=False).encode()

    def _post(self, url: str, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            return response.read()

    def _read(self, url: str, answer: bytes, rows: TextRows) -> Answer:
        try:
            content = json.loads(answer)
        except ValueError as error:
            raise RewardError(
                f"reward {self.name!r}: {url} did not answer JSON: {answer[:80]!r}"
            ) from error
        if not isinstance(content, dict) or "scores" not in content:
            raise RewardError(
                f'reward {self.name!r}: {url} must answer {{"scores": [...]}}: {answer[:80]!r}'
            )
        return checked_scores(self.name, content["scores"], rows)

    def _wait_s(self, attempt: int) -> float:
        """Doubles from half a second; the second half of it is drawn at random."""
        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1))
        return longest * self._jitter.uniform(0.5, 1.0)


def _first_line(error: urllib.error.HTTPError) -> str:
    text = error.read(200).decode(errors="replace").strip()
    return text.splitlines()[0] if text else "no text"
