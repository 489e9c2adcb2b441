"""One exchange of a load test over a socket of its own: what came back, and when."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import struct
import time
from typing import Any

import h11
from load_exchanges import Exchange

READ_BYTES, SLOW_BYTES, SLOW_PAUSE_S = 65536, 16, 0.01
LEAVE_AFTER_S = 1.0  # a client that does not wait for a first piece
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """How an exchange went; times in seconds of time.perf_counter."""

    kind: str
    began: float
    ended: float = 0.0
    status: int | None = None
    left: bool = False
    tokens: int = 0
    pieces: list[float] = dataclasses.field(default_factory=list)
    """When pieces of text arrived, of streams."""
    problem: str | None = None
    """Why the answer is none, or no right one."""

    @property
    def end(self) -> str:
        """One word for how it went."""
        if self.problem is not None:
            return "failed"
        if self.left:
            return "left"
        if self.status is None:
            return "closed"
        return "answered" if self.status == 200 else f"refused {self.status}"


class Answer:
    """The answer to one exchange, parsed while it arrives."""

    def __init__(self, exchange: Exchange):
        self.status: int | None = None
        self.complete = False
        self.broken: str | None = None
        self.pieces: list[float] = []
        self.tokens: int | None = None
        self._exchange = exchange
        self._type = ""
        self._content = b""
        self._events: list[Any] = []
        # h11 only has to know that a POST was sent; the bytes that it would send are not used.
        self._http = h11.Connection(h11.CLIENT)
        self._http.send(h11.Request(method="POST", target="/", headers=[("Host", "127.0.0.1")]))
        self._http.send(h11.EndOfMessage())

    def feed(self, data: bytes) -> None:
        """Takes what was read; b"" says that the server has closed."""
        try:
            self._http.receive_data(data)
            while not self.complete:
                event = self._http.next_event()
                if isinstance(event, h11.Response):
                    self.status = event.status_code
                    self._type = dict(event.headers).get(b"content-type", b"").decode()
                elif isinstance(event, h11.Data):
                    self._content += bytes(event.data)
                    if self._is_stream:
                        self._take_events()
                elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    self.complete = True
                elif event is h11.NEED_DATA:
                    break
        except h11.RemoteProtocolError as error:
            self.complete = True
            # Without a status there was no answer at all, which `problem` judges.
            self.broken = None if self.status is None else f"the answer is cut or no HTTP: {error}"

    @property
    def _is_stream(self) -> bool:
        return self._exchange.stream and self.status == 200

    def _take_events(self) -> None:
        """Moves whole events from the content to the list."""
        *whole, self._content = self._content.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._take_event(line.removeprefix(b"data:").strip())

    def _take_event(self, data: bytes) -> None:
        event: Any = "[DONE]"
        if data != b"[DONE]":
            try:
                event = json.loads(data)
            except ValueError:
                self.broken = f"an event is no JSON: {data[:80]!r}"
                return
            if any(_text_of(choice) for choice in event.get("choices", ())):
                self.pieces.append(time.perf_counter())
            if usage := event.get("usage"):
                self.tokens = usage["completion_tokens"]
        self._events.append(event)

    def problem(self) -> str | None:
        """Why this is not the answer that the exchange may get; None if it is."""
        if self.broken is not None:
            return self.broken
        if self.status is None:
            return None if self._exchange.closes else "closed without an answer"
        if self.status not in self._exchange.statuses:
            return f"status {self.status}: {self._content[:200]!r}"
        if self._is_stream:
            return self._stream_problem()
        if not self._exchange.json_error:
            return None
        try:
            content = json.loads(self._content)
        except ValueError:
            return f"no JSON: {self._content[:80]!r}"
        if self.status == 200:
            self.tokens = content["usage"]["completion_tokens"]
            found = len(content["choices"])
            wrong = f"{found} choices instead of {self._exchange.choices}"
            return None if found == self._exchange.choices else wrong
        return None if _is_error(content) else f"a refusal without a message: {content}"

    def _stream_problem(self) -> str | None:
        if self._content.strip():
            return f"a stream ends within an event: {self._content[:80]!r}"
        last = self._events[-1] if self._events else None
        if _is_error(last):  # explicit, if late
            return None
        finished = {
            choice["index"]
            for event in self._events
            if event != "[DONE]"
            for choice in event.get("choices", ())
            if choice.get("finish_reason") is not None
        }
        if not finished:
            return "a stream without a finish_reason"
        return "a stream without [DONE]" if self._exchange.needs_done and last != "[DONE]" else None

    @property
    def failed_late(self) -> bool:
        """Whether a stream ended with an explicit error."""
        return bool(self._events) and _is_error(self._events[-1])


def _text_of(choice: dict) -> str | None:
    return choice.get("text") or choice.get("delta", {}).get("content")


def _is_error(content: Any) -> bool:
    error = content.get("error") if isinstance(content, dict) else None
    return isinstance(error, dict) and bool(error.get("message"))


async def converse(port: int, exchange: Exchange, *, patience: float) -> Outcome:
    """Makes one exchange; it fails where there is no answer in `patience` seconds."""
    outcome, answer = Outcome(kind=exchange.kind, began=time.perf_counter()), Answer(exchange)
    try:
        async with asyncio.timeout(patience):
            await _talk(port, exchange, answer, outcome)
        if not outcome.left:
            outcome.problem = answer.problem()
    except TimeoutError:
        outcome.problem = f"no whole answer within {patience:g} s"
    except OSError as error:
        outcome.problem = f"no connection: {error}"
    outcome.status, outcome.pieces = answer.status, answer.pieces
    if outcome.problem is None and answer.failed_late:
        outcome.status = 503  # the head said 200 before
    outcome.tokens = len(answer.pieces) if answer.tokens is None else answer.tokens
    outcome.ended = time.perf_counter()
    return outcome


async def _talk(port: int, exchange: Exchange, answer: Answer, outcome: Outcome) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        if exchange.slow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(client, ("127.0.0.1", port))
        sending = asyncio.create_task(_send(client, exchange.sent))
        try:
            if exchange.leaves_after == 0:
                await sending
                await asyncio.sleep(LEAVE_AFTER_S)
                outcome.left = True
            while not (answer.complete or outcome.left):
                answer.feed(await _receive(client, SLOW_BYTES if exchange.slow else READ_BYTES))
                if exchange.slow:
                    await asyncio.sleep(SLOW_PAUSE_S)
                if exchange.leaves_after is not None and not answer.complete:
                    outcome.left = len(answer.pieces) >= exchange.leaves_after
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
        if outcome.left and exchange.resets:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


async def _send(client: socket.socket, content: bytes) -> None:
    """Sends all; a server that has answered already may have closed."""
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(client, content)


async def _receive(client: socket.socket, most: int) -> bytes:
    """What is there to read; b"" for a closed connection, also one that was reset."""
    try:
        return await asyncio.get_running_loop().sock_recv(client, most)
    except ConnectionError:
        return b""
