"""One HTTP request on its way: its requests to the engine, its events, and how it may end."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Protocol

from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Event, Request
from lookahead_jax.server.errors import RETRY, Refused
from lookahead_jax.server.metrics import Metrics


class CallOwner(Protocol):
    """What a call needs of the service that it belongs to."""

    engine: Engine
    metrics: Metrics
    places: int
    client_places: int

    def take(self, client: str, places: int) -> None: ...

    def give_back(self, client: str, places: int) -> None: ...


class Call:
    """What one HTTP request of `client` has asked of the engine, and how others may end it."""

    def __init__(self, service: CallOwner, client: str):
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call belongs to a task")
        self.task = task
        self._service = service
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._timers: list[asyncio.TimerHandle] = []
        self._queued: tuple[Future[None], int] | None = None
        self._aborted = False
        self._reason: Exception | None = None
        self._lock = threading.Lock()
        self._ids: list[int] = []
        self._closed = False

    def abort(self, why: Exception) -> None:
        """Ends the request with `why`, unless it is ending already."""
        if not self._aborted:
            self._aborted, self._reason = True, why
            self.task.cancel()

    def take_reason(self) -> Exception | None:
        """Why the request was aborted, if it was; the call forgets it, so that no cycle arises."""
        why, self._reason = self._reason, None
        return why

    def end_after(self, seconds: float, message: str, code: str) -> asyncio.TimerHandle:
        """Ends the request with status 503 after `seconds`, unless the timer is cancelled."""
        why = Refused(503, f"{message} {seconds:g} s", code=code, headers=RETRY)
        timer = self._loop.call_later(seconds, self.abort, why)
        self._timers.append(timer)
        return timer

    async def submit(
        self,
        count: int,
        make: Callable[[], Sequence[Request]],
        *,
        threads: Executor | None = None,
    ) -> None:
        """Gives the engine the `count` requests that `make` returns, from one of `threads`.

        Raises `Refused` if there are too few places, ValueError for requests that the engine
        cannot serve.
        """
        most = self._service.client_places
        if count > most:
            whose = "one client may have" if most < self._service.places else "there is room for"
            raise ValueError(
                f"{count} continuations are more than the {most} {whose}: ask for fewer prompts or "
                "choices (n) at a time"
            )
        self._service.take(self._client, count)
        # Shielded, so that the thread sees to the places even if this task is cancelled. No local
        # variable holds the future: with an error in it, that would be a cycle.
        await asyncio.shield(self._begin(count, make, threads))

    async def next(self) -> tuple[int, Event]:
        """The next event, and the index of its request."""
        return await self._events.get()

    def close(self) -> None:
        """Cancels the requests that still run; they end within a burst."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        with self._lock:
            self._closed = True
        if self._queued is not None:
            work, count = self._queued
            self._queued = None
            if work.cancel():  # no thread has taken it, and none will give the places back
                self._service.give_back(self._client, count)
        self._cancel()

    def _begin(
        self, count: int, make: Callable[[], Sequence[Request]], threads: Executor | None
    ) -> asyncio.Future[None]:
        try:
            if threads is None:
                return self._loop.run_in_executor(None, self._submit, count, make)
            work = threads.submit(self._submit, count, make)
        except BaseException:  # no thread will give the places back
            self._service.give_back(self._client, count)
            raise
        self._queued = work, count
        return asyncio.wrap_future(work)

    def _submit(self, count: int, make: Callable[[], Sequence[Request]]) -> None:
        """In another thread."""
        ids: list[int] = []
        try:
            if self._closed:  # while it waited for a thread
                return
            requests = [
                dataclasses.replace(request, on_event=partial(self._hear, i))
                for i, request in enumerate(make())
            ]
            ids = self._service.engine.submit_all(requests)
        except Exception:
            raise
        except BaseException as error:  # such as a panic of an extension
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        finally:
            if not ids:
                self._service.give_back(self._client, count)
        with self._lock:
            self._ids = ids
            late = self._closed
        if late:  # the call ended while its prompts were tokenized
            self._cancel()

    def _cancel(self) -> None:
        for id in self._ids:
            self._service.engine.cancel(id)

    def _hear(self, index: int, event: Event) -> None:
        """In the engine's thread."""
        if event.result is not None:
            self._service.give_back(self._client, 1)
            self._service.metrics.ended(event.result)
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
