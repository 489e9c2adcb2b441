"""Reading bodies within limits, noticing clients that leave, sending server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lookahead_jax.server.call import Call
from lookahead_jax.server.errors import Gone, Refused
from lookahead_jax.server.service import Service, too_large

_BODY_SECONDS = 30.0  # to send a body
_LAST_SECONDS = 5.0  # to send the rest of a refused body, or to receive a stream's last error
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # tells proxies to pass pieces on at once
]


async def read_body(scope: Scope, receive: Receive, service: Service) -> bytes:
    """The body of a request that says it is JSON; `Refused` beyond the limits of the service.

    The type is required because a web page cannot send it to another origin without permission.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the body must be sent as Content-Type: application/json")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > service.limits.max_body_bytes:
        raise too_large(service.limits.max_body_bytes)
    with service.receiving() as buffer:
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in _chunks(receive):
                    buffer.add(chunk)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None
        return bytes(buffer.content)


async def discard_body(scope: Scope, receive: Receive) -> None:
    """Receives the rest of a body: a client that is still sending does not read an answer."""
    if "expect" in Headers(scope=scope):  # it asks before it sends
        return
    with contextlib.suppress(TimeoutError, Gone):
        async with asyncio.timeout(_LAST_SECONDS):
            async for _ in _chunks(receive):
                pass


async def _chunks(receive: Receive):
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def watch(receive: Receive, call: Call) -> None:
    """Ends the call when its client leaves; runs as a task of its own once the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.abort(Gone())


class EventStream:
    """An answer as server-sent events; the first one sends the head."""

    def __init__(self, send: Send):
        self._send = send
        self.begun = False

    async def put(self, *pieces: Mapping[str, Any] | str) -> None:
        """Sends events, if any: objects as JSON, strings unchanged."""
        if not pieces:
            return
        if not self.begun:
            self.begun = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
            )
        lines = [
            piece if isinstance(piece, str) else json.dumps(piece, separators=(",", ":"))
            for piece in pieces
        ]
        body = "".join(f"data: {line}\n\n" for line in lines).encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def close(self) -> None:
        """Ends the answer."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, why: Refused) -> None:
        """Ends the answer with an error instead of [DONE], if the client receives it in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SECONDS):
                await self.put(why.body)
                await self.close()
