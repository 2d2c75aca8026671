"""Reward ``http``: a scorer elsewhere says what an answer is worth."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.rl.rewards.base import Verdict
from posttrain_lib.schema.rollouts import Answer

#: answers of a server after which the same question may have a better one
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LARGEST_REPLY = 1 << 20
_LONGEST_WAIT = 5.0


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """The redirection stays the error that it is: following one turns a POST into a GET without its content."""


_OPENER = urllib.request.build_opener(_Stay)


class Http:
    """Posts ``{"prompt": messages, "text", "expected", "extra"}`` as JSON and takes ``{"reward": number}`` of the
    reply, and ``"correct": bool`` where it has one.

    A connection that fails or breaks off and the statuses 408, 425, 429 and most of 5xx are tried again, after waits
    that double. The reward's deadline ends all of it in any case. A redirection is an error: another server would be
    asked, with these headers and without the answer.

    Args:
        url: http or https.
        retries: further attempts.
        wait_seconds: before the first of them.
        timeout_seconds: of one attempt.
        headers: sent beside the content type.

    Raises:
        ConfigError: the url is of another kind.
    """

    def __init__(
        self,
        url: str,
        retries: int = 3,
        wait_seconds: float = 0.2,
        timeout_seconds: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                "a scorer is asked by http", where="rewards: url", got=url, expected="http:// or https://"
            )
        self._url, self._retries, self._wait, self._timeout = url, retries, wait_seconds, timeout_seconds
        self._headers = {"Content-Type": "application/json", **(headers or {})}

    def __call__(self, answer: Answer) -> Verdict:
        """DataError where the scorer's reply has no reward, or after the last attempt none came."""
        asked = {"prompt": answer.prompt, "text": answer.text, "expected": answer.expected, "extra": answer.extra}
        reply = self._ask(json.dumps(asked).encode())
        if not isinstance(reply, dict) or "reward" not in reply:
            raise DataError("the scorer's reply has no reward", where=self._url, got=str(reply)[:200])
        return Verdict(reply["reward"], reply.get("correct"))

    def _ask(self, content: bytes) -> Any:
        for attempt in range(self._retries + 1):
            try:
                return self._attempt(content)
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                final = isinstance(error, urllib.error.HTTPError) and error.code not in _RETRIED
                if final or attempt == self._retries:
                    raise DataError(
                        "the scorer did not answer", where=self._url, got=f"{error} after {attempt + 1} attempts"
                    ) from error
            time.sleep(min(self._wait * 2**attempt, _LONGEST_WAIT))

    def _attempt(self, content: bytes) -> Any:
        request = urllib.request.Request(self._url, content, self._headers)
        with _OPENER.open(request, timeout=self._timeout) as reply:
            said = reply.read(_LARGEST_REPLY + 1)
            missing = reply.length  # of what was announced; a read with a bound does not raise for it
        if len(said) > _LARGEST_REPLY:
            raise DataError(
                "the scorer's reply is too long", where=self._url, expected=f"at most {_LARGEST_REPLY} bytes"
            )
        if missing:
            raise http.client.IncompleteRead(said, missing)
        try:
            return json.loads(said)
        except ValueError as error:
            raise DataError("the scorer's reply is no JSON", where=self._url, got=str(said[:200])) from error
