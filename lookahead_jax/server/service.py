"""The engine's thread, and the places in its queue.

The event loop handles HTTP; one thread steps the engine, and only that thread uses the device.
"""

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from lookahead_jax.engine.engine import Engine
from lookahead_jax.server.call import Call
from lookahead_jax.server.errors import RETRY, Refused
from lookahead_jax.server.limits import ServerLimits
from lookahead_jax.server.metrics import Metrics

_log = logging.getLogger(__name__)
_GRAMMAR_THREADS = 2
_BODIES = 64  # of the largest size, that may be in memory while they are received


class Service:
    """An engine shared by several HTTP requests; the methods belong to the event loop.

    `keys` is how many API keys the server has.
    """

    def __init__(self, engine: Engine, limits: ServerLimits, *, keys: int = 0):
        self.engine = engine
        self.limits = limits
        self.metrics = Metrics(engine, lambda: self.taken)
        engine.on_pause = self.metrics.paused
        self.places = engine.rows + limits.max_queue
        self.client_places = engine.rows + limits.client_queue(keys)
        # Compiling a grammar cannot be interrupted: other requests have threads of their own.
        self.grammar_threads = ThreadPoolExecutor(_GRAMMAR_THREADS, "grammar")
        self._calls: set[Call] = set()
        self._closed: Refused | None = None  # why new requests are refused
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._body_bytes = 0
        self._lock = threading.Lock()  # of what follows
        self._taken: Counter[str] = Counter()  # by client

    def start(self) -> None:
        """Begins to step the engine."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread; to be called when every request has been answered."""
        self._stop.set()
        self.grammar_threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join)

    def drain(self, seconds: float) -> None:
        """From any thread: refuses new requests, and ends running ones after `seconds`."""
        why = Refused(503, "the server is shutting down", code="shutting_down")
        self._closed = self._closed or why
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._abort_all, why)

    def check(self) -> None:
        """Raises `Refused` if the service takes no more requests."""
        if self._closed is not None:
            raise self._closed.copy()

    def check_room(self) -> None:
        """As `check`, and `Refused` with status 503 while the queue is full."""
        self.check()
        if self.taken >= self.places:
            raise Refused(503, "the queue is full", code="queue_full", headers=RETRY)

    @contextlib.contextmanager
    def call(self, client: str) -> Iterator[Call]:
        """A new HTTP request; `Refused` with status 429 at once if there is no place for it.

        `Call.abort` cancels the body of the `with` block, and its reason is raised from here.
        """
        self.check()
        with self._lock:
            self._check_places(client, 1)
        call = Call(self, client)
        self._calls.add(call)
        try:
            yield call
        except asyncio.CancelledError:
            if (why := call.take_reason()) is None:
                raise
            call.task.uncancel()
            try:
                raise why from None
            finally:
                del why  # its traceback has this frame
        finally:
            self._calls.remove(call)
            call.close()

    @contextlib.contextmanager
    def receiving(self) -> Iterator["BodyBuffer"]:
        """A buffer for a body; together they are bounded, however slowly clients send."""
        buffer = BodyBuffer(self)
        try:
            yield buffer
        finally:
            self._body_bytes -= len(buffer.content)

    def take_memory(self, size: int) -> None:
        """Counts bytes of bodies; `Refused` with status 503 if there are too many."""
        if self._body_bytes + size > _BODIES * self.limits.max_body_bytes:
            raise Refused(503, "too many bodies are being received", headers=RETRY)
        self._body_bytes += size

    def take(self, client: str, places: int) -> None:
        """Takes places in the queue; `Refused` with status 429 if there are too few."""
        with self._lock:
            self._check_places(client, places)
            self._taken[client] += places

    def give_back(self, client: str, places: int) -> None:
        """From any thread: gives back places of continuations that have ended or never begin."""
        with self._lock:
            self._taken[client] -= places
            if not self._taken[client]:
                del self._taken[client]

    @property
    def taken(self) -> int:
        """Places that are taken at the moment."""
        with self._lock:
            return self._taken.total()

    def _check_places(self, client: str, places: int) -> None:
        """Raises `Refused` if a client cannot have more places; the caller holds the lock."""
        if self._taken.total() + places > self.places:
            raise Refused(429, "the queue is full", code="queue_full", headers=RETRY)
        if self._taken[client] + places > self.client_places:
            raise Refused(
                429,
                f"one client may have {self.client_places} continuations that run or wait "
                "(max_queue_per_client and the rows): send the request again when some of yours "
                "have ended",
                code="client_queue_full",
                headers=RETRY,
            )

    def _abort_all(self, why: Refused) -> None:
        for call in list(self._calls):
            call.abort(why.copy())

    def _work(self) -> None:
        """The engine's thread: steps until it is told to stop and all requests have ended."""
        try:
            while not self._stop.is_set() or self.engine.alive:
                if self.engine.wait(0.1):
                    self.engine.step()
        except BaseException:  # panics of extensions are no Exception
            _log.exception("the engine's thread failed; restart the server")
            why = self._closed = Refused(503, "the engine has failed", code="engine_failed")
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._abort_all, why)


class BodyBuffer:
    """The part of a body that has been received."""

    def __init__(self, service: Service):
        self._service = service
        self.content = bytearray()

    def add(self, chunk: bytes) -> None:
        """Appends a chunk; `Refused` if it exceeds the limit of one body or of all."""
        most = self._service.limits.max_body_bytes
        if len(self.content) + len(chunk) > most:
            raise too_large(most)
        self._service.take_memory(len(chunk))
        self.content += chunk


def too_large(limit: int) -> Refused:
    """The answer to a body beyond its limit."""
    return Refused(413, f"the body has more than {limit} bytes", code="body_too_large")
