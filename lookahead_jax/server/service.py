"""The engine's thread, the places in its queue, and the HTTP requests that hold them.

The event loop talks HTTP; one thread steps the engine, and nothing else touches the device.
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Event, Request
from lookahead_jax.server.errors import Refused
from lookahead_jax.server.limits import ServerLimits
from lookahead_jax.server.metrics import Metrics

_log = logging.getLogger(__name__)
_RETRY = {"Retry-After": "1"}


class Service:
    """An engine that several HTTP requests use; its methods belong to the event loop."""

    def __init__(self, engine: Engine, limits: ServerLimits):
        self.engine = engine
        self.limits = limits
        self.metrics = Metrics(engine)
        self.places = engine.rows + limits.max_queue
        self._calls: set[Call] = set()
        self._closed: Refused | None = None  # why nothing more is taken on
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # of what follows
        self._taken = 0

    def start(self) -> None:
        """Begins to step the engine."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread; to be called when every request has been answered."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join)

    def drain(self, seconds: float) -> None:
        """From any thread: takes nothing more on; what has not ended after `seconds` fails."""
        why = Refused(503, "the server is shutting down", code="shutting_down")
        self._closed = self._closed or why
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._abort_all, why)

    def check(self) -> None:
        """Raises `Refused` if the service takes nothing on."""
        if self._closed is not None:
            raise self._closed

    @contextlib.contextmanager
    def call(self) -> Iterator["Call"]:
        """Room for one HTTP request, which takes one place in the queue.

        An `abort` of the call ends the body, wherever it waits, and is raised from here.
        """
        self.check()
        self.take(1)
        call = Call(self)
        self._calls.add(call)
        try:
            yield call
        except asyncio.CancelledError:
            if call.why is None:
                raise
            call.task.uncancel()
            raise call.why from None
        finally:
            self._calls.remove(call)
            call.close()

    def take(self, places: int) -> None:
        """Takes places in the queue; `Refused` with status 429 if there are not as many."""
        with self._lock:
            if self._taken + places > self.places:
                raise Refused(429, "the queue is full", code="queue_full", headers=_RETRY)
            self._taken += places

    def give_back(self, places: int) -> None:
        """From any thread: as many continuations have ended, or will never begin."""
        with self._lock:
            self._taken -= places

    @property
    def taken(self) -> int:
        """Places that are taken at the moment."""
        with self._lock:
            return self._taken

    def _abort_all(self, why: Refused) -> None:
        for call in list(self._calls):
            call.abort(why)

    def _work(self) -> None:
        """The engine's thread: goes on until it is told to stop, and all it has begun has ended."""
        try:
            while not self._stop.is_set() or self.engine.alive:
                if self.engine.wait(0.1):
                    self.engine.step()
        except Exception:
            _log.exception("the engine's thread failed; the server has to be started again")
            why = self._closed = Refused(503, "the engine has failed", code="engine_failed")
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._abort_all, why)


class Call:
    """One HTTP request: what it has asked of the engine, and how it may be ended from outside."""

    def __init__(self, service: Service):
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call belongs to a task")
        self.task = task
        self.why: Exception | None = None
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._timers: list[asyncio.TimerHandle] = []
        self._places = 1  # to give back if the engine never hears of the request
        self._lock = threading.Lock()
        self._ids: list[int] = []
        self._closed = False

    def abort(self, why: Exception) -> None:
        """Ends the request with `why`, unless it is ending already."""
        if self.why is None:
            self.why = why
            self.task.cancel()

    def end_after(self, seconds: float, message: str, code: str) -> asyncio.TimerHandle:
        """Ends the request with status 503 after `seconds`, unless the timer is cancelled."""
        why = Refused(503, f"{message} {seconds:g} s", code=code, headers=_RETRY)
        timer = self._loop.call_later(seconds, self.abort, why)
        self._timers.append(timer)
        return timer

    async def submit(self, count: int, make: Callable[[], Sequence[Request]]) -> None:
        """Gives the engine the `count` requests that `make` returns, from another thread.

        Raises `Refused` for what has no place, ValueError for what the engine cannot serve.
        """
        if count > self._service.places:
            raise ValueError(
                f"{count} continuations are more than the {self._service.places} there is room for"
            )
        self._service.take(count - 1)
        self._places = 0
        # Shielded: whatever becomes of this task, the thread sees to the places.
        failed = await asyncio.shield(self._loop.run_in_executor(None, self._submit, count, make))
        if failed is not None:
            raise failed

    async def next(self) -> tuple[int, Event]:
        """The next news of the requests: which of them, and what."""
        return await self._events.get()

    def close(self) -> None:
        """Whatever still runs is cancelled, within a burst."""
        for timer in self._timers:
            timer.cancel()
        self._service.give_back(self._places)
        with self._lock:
            self._closed = True
        self._cancel()

    def _submit(self, count: int, make: Callable[[], Sequence[Request]]) -> Exception | None:
        try:
            requests = [
                dataclasses.replace(request, on_event=partial(self._hear, i))
                for i, request in enumerate(make())
            ]
            ids = self._service.engine.submit_all(requests)
        except Exception as error:
            self._service.give_back(count)
            return error
        with self._lock:
            self._ids = ids
            late = self._closed
        if late:  # the call ended while its prompts were tokenized
            self._cancel()
        return None

    def _cancel(self) -> None:
        for id in self._ids:
            self._service.engine.cancel(id)

    def _hear(self, index: int, event: Event) -> None:
        """In the engine's thread."""
        if event.result is not None:
            self._service.give_back(1)
            self._service.metrics.ended(event.result)
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
