"""Bytes in and out: bodies with a limit, clients that leave, streams of server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from lookahead_jax.server.errors import Gone, Refused
from lookahead_jax.server.service import Call

_BODY_SECONDS = 30.0  # to send a body in
_LAST_SECONDS = 5.0  # to send the rest of one that nobody reads, or to take a stream's last error
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies are to pass pieces on at once
]


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body of a request, of at most `limit` bytes and of JSON by its own account.

    The type is required because a page in a browser cannot send it to another origin unasked.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the body must be sent as Content-Type: application/json")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in _chunks(receive):
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {_BODY_SECONDS:g} s") from None
    return bytes(body)


async def discard_body(scope: Scope, receive: Receive) -> None:
    """Takes in what is left of a body: a client that is still sending does not read an answer."""
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
    """Ends the call when its client leaves; to be run beside it, once the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.abort(Gone())


class EventStream:
    """An answer in pieces, as server-sent events; it begins with the first of them."""

    def __init__(self, send: Send):
        self._send = send
        self.begun = False

    async def put(self, *pieces: Mapping[str, Any] | str) -> None:
        """Sends objects as JSON and texts as they are."""
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
        """Nothing more comes."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, why: Refused) -> None:
        """Ends with an error in place of [DONE], if the client takes it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SECONDS):
                await self.put(why.body)
                await self.close()


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body has more than {limit} bytes", code="body_too_large")
