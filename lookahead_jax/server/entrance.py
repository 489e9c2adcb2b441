"""What every request passes: its id, the check of the key, the count and the line in the log."""

import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lookahead_jax.server.clients import client_address
from lookahead_jax.server.errors import Refused
from lookahead_jax.server.metrics import Metrics
from lookahead_jax.server.request_log import RequestRecord, add_record

_ID = re.compile(r"[!-~]{1,128}")
_OPEN = ("/", "/health", "/ready")  # need no key
_PROBES = ("/health", "/ready", "/metrics")  # logged only if they fail: they come all the time
_NO_KEY = Refused(
    401,
    "the key is missing or wrong; send it as Authorization: Bearer KEY",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


class Entrance:
    """An ASGI application around the one that answers; `paths` are those of its routes."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str], keys: Sequence[str]):
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), client_address(scope.get("client")))
        add_record(scope, record)
        status = 499  # the client left before there was an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", record.id.encode())
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        app = self._app
        if self._keys and scope["path"] not in _OPEN:
            record.key = self._key_of(scope)
            if record.key is None:
                app, record.error = _NO_KEY.response(), _NO_KEY.code
        try:
            await app(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.responded(path, status)
            if status != 200 or path not in _PROBES:
                record.log(path, status)

    def _key_of(self, scope: Scope) -> int | None:
        """The number of the key that the client has sent, from 1; None for another or none."""
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        sent = given.strip().encode()
        # All are compared, so that the time does not tell which are alike.
        same = [hmac.compare_digest(sent, key) for key in self._keys]
        return same.index(True) + 1 if kind.lower() == "bearer" and any(same) else None


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id if it is short and printable ASCII, or a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex
