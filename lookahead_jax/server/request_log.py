"""One line of JSON for every request. None holds a prompt, an output or a key.

The id of a request is the only text of a client in it.
"""

import datetime
import json
import logging
import sys
import time
from typing import Any

from starlette.types import Scope

from lookahead_jax.engine.requests import Event, Result

_KEY = "lookahead_jax.record"
_log = logging.getLogger(__name__)


class RequestRecord:
    """What is known of one request, from its arrival to its end."""

    def __init__(self, id: str, address: str = ""):
        self.id = id
        self._address = address
        self.key: int | None = None
        """The number of the client's key among those of the server."""
        self.error: str | None = None
        """The code of the error that ended it, or client_left."""
        self._arrived = time.perf_counter()
        self._first_token_s: float | None = None
        self._new_tokens = 0
        self._prompt_tokens: dict[int, int] = {}  # by number of the prompt
        self._results: list[Result] = []

    @property
    def tenant(self) -> str:
        """Whose request it is, to the engine."""
        return "" if self.key is None else f"key {self.key}"

    @property
    def client(self) -> str:
        """Whose request it is, to the limits per client: its key, or else its address."""
        return self.tenant or self._address

    def take(self, event: Event, prompt: int) -> None:
        """Notes an event of a continuation of its prompt number `prompt`."""
        if event.tokens and self._first_token_s is None:
            self._first_token_s = self._elapsed()
        self._new_tokens += len(event.tokens)
        if event.result is not None:
            self._results.append(event.result)
            self._prompt_tokens[prompt] = event.result.prompt_tokens

    def log(self, path: str, status: int) -> None:
        """Writes the line; `path` is that of a route."""
        if not _log.isEnabledFor(logging.INFO):
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": now, "request_id": self.id, "key": self.key, "path": path, "status": status,
            "total_s": round(self._elapsed(), 4), "error": self.error, **self._continuations(),
        }  # fmt: skip
        _log.info(json.dumps({name: value for name, value in fields.items() if value is not None}))

    def _continuations(self) -> dict[str, Any]:
        """Fields of a request that has continuations with tokens, or that have ended."""
        if self._first_token_s is None and not self._results:
            return {}
        fields: dict[str, Any] = {"new_tokens": self._new_tokens}
        if self._first_token_s is not None:
            fields["first_token_s"] = round(self._first_token_s, 4)
        if ended := sorted(self._results, key=lambda result: result.id):
            waited = [result.timing.started_s or 0.0 for result in ended]
            fields["prompt_tokens"] = sum(self._prompt_tokens.values())
            fields["queue_s"] = round(min(waited), 4)
            fields["finish"] = [result.finish for result in ended]
        return fields

    def _elapsed(self) -> float:
        return time.perf_counter() - self._arrived


def add_record(scope: Scope, record: RequestRecord) -> None:
    """Attaches a record to its request."""
    scope[_KEY] = record


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request."""
    return scope[_KEY]


def log_requests() -> None:
    """Writes the lines to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
