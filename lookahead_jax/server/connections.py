"""Connections with limits: how many there are, how long they may be idle, and how they end."""

import asyncio
import errno
import json
import logging
from collections import Counter
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lookahead_jax.server.clients import client_address
from lookahead_jax.server.errors import Refused
from lookahead_jax.server.limits import ServerLimits

BACKLOG = 128
"""Connections accepted at once, before the first of them is counted."""
_RESERVE = 64  # descriptors for everything but connections: files, devices, threads' pipes
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOG_SECONDS = 60.0
_PROBE_SECONDS, _MOST_PROBE_SECONDS = 0.1, 5.0
_log = logging.getLogger(__name__)


def _answer(refused: Refused) -> bytes:
    """A whole answer to a connection that has sent no request yet."""
    phrase, body = HTTPStatus(refused.status).phrase, json.dumps(refused.body)
    return (
        f"HTTP/1.1 {refused.status} {phrase}\r\ncontent-type: application/json\r\n"
        f"retry-after: 1\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    ).encode()


_BUSY = _answer(Refused(503, "too many connections", code="connections_full"))
_BUSY_CLIENT = _answer(
    Refused(
        429,
        "too many connections from your address (max_connections_per_client): close some, or "
        "send several requests over one",
        code="client_connections_full",
    )
)


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with limits on connections; `limited_protocol` sets the class variables.

    A client that has shut down its sending side is answered. Whether it has left altogether shows
    only when something is sent: an interim "100 Continue" or a comment in a stream of events, both
    of which clients skip. HTTP/1.0 has no interim answers, and proxies that speak it close both
    sides: there, the end of the sending side ends the request.
    """

    max_connections: int
    max_connections_per_client: int | None
    addresses: Counter[str]  # of the open connections
    idle_seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._head_begun = False
        self._restart_timer()
        self._address = client_address(self.client)
        self.addresses[self._address] += 1
        own, most_own = self.addresses[self._address], self.max_connections_per_client
        if len(self.connections) > self.max_connections:
            self._refuse(_BUSY)
        elif most_own is not None and own > most_own:
            self._refuse(_BUSY_CLIENT)

    def _refuse(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self.addresses[self._address] -= 1
        if not self.addresses[self._address]:
            del self.addresses[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_busy = self._busy
        super().data_received(data)
        if not was_busy and (self._busy or not self._head_begun):
            self._head_begun = True
            self._restart_timer()

    def on_response_complete(self) -> None:
        self._head_begun = False
        self._restart_timer()
        super().on_response_complete()  # may begin the next request

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if not self._busy or self.cycle.more_body or self.cycle.scope["http_version"] != "1.1":
            return None  # closes the connection
        self.cycle.keep_alive = False
        self._probe(_PROBE_SECONDS)
        return True

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._unsent: int | None = None  # bytes that the client had yet to read
        self._timer = self.loop.call_later(self.idle_seconds, self._check)

    def _check(self) -> None:
        """Closes a connection whose client neither sends a request nor reads its answer."""
        unsent, before = self.transport.get_write_buffer_size(), self._unsent
        if (before is None or unsent < before) if unsent else self._busy:
            self._unsent = unsent or None
            self._timer = self.loop.call_later(self.idle_seconds, self._check)
        else:
            self.transport.abort()

    def _probe(self, seconds: float) -> None:
        if not self._busy or self.transport.is_closing():
            return
        if not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif not self.flow.write_paused:  # what has begun and not ended is a stream of events
            self.transport.write(self.conn.send(h11.Data(data=b":\n\n")) or b"")
        pause = min(2 * seconds, _MOST_PROBE_SECONDS)
        self._probe_timer = self.loop.call_later(seconds, self._probe, pause)


def limited_protocol(limits: ServerLimits) -> type[LimitedProtocol]:
    """The protocol with these limits, and with as many connections as there are descriptors for.

    Raises ValueError where the process may open hardly any file.
    """
    most = limits.max_connections
    if (descriptors := _max_descriptors()) is not None:
        most = min(most, descriptors - BACKLOG - _RESERVE)
    if most < 1:
        raise ValueError(
            f"the process may open {descriptors} files, and a server needs more than "
            f"{BACKLOG + _RESERVE}: raise the limit (ulimit -n)"
        )
    values = {
        "max_connections": most,
        "max_connections_per_client": limits.max_connections_per_client,
        "addresses": Counter(),
        "idle_seconds": limits.idle_seconds,
    }
    return type("Protocol", (LimitedProtocol,), values)


class AcceptErrors:
    """A handler of the event loop's errors that logs scarce descriptors once a minute.

    asyncio itself logs a traceback for each of many attempts per second.
    """

    def __init__(self):
        self._logged: float | None = None

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _SCARCE and "socket" in context):
            loop.default_exception_handler(context)
            return
        now = loop.time()
        if self._logged is None or now - self._logged >= _LOG_SECONDS:
            self._logged = now
            _log.error("no new connections for now: %s (lower --max-connections)", error.strerror)


def _max_descriptors() -> int | None:
    """How many files the process may have open; None where there is no such limit."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
