"""The requests of an engine that several threads share: waiting, running and cancelled ones."""

import threading
from collections import Counter
from collections.abc import Sequence

from lookahead_jax.engine.requests import ActiveRequest


class RequestQueue:
    """All requests that have not ended; every method may be called from any thread."""

    def __init__(self):
        self._changed = threading.Condition()
        self._waiting: dict[int, ActiveRequest] = {}  # in the order of arrival
        self._alive: dict[int, ActiveRequest] = {}
        self._cancelled: set[int] = set()
        self._served: dict[str, int] = {}  # the last turn of each tenant
        self._turn = 0

    @property
    def waiting(self) -> int:
        """Number of requests that have no row yet."""
        with self._changed:
            return len(self._waiting)

    @property
    def alive(self) -> int:
        """Number of requests that have not ended, waiting ones included."""
        with self._changed:
            return len(self._alive)

    def add(self, requests: Sequence[ActiveRequest]) -> None:
        """Appends requests next to each other."""
        with self._changed:
            added = {request.id: request for request in requests}
            self._alive.update(added)
            self._waiting.update(added)
            self._changed.notify_all()

    def cancel(self, id: int) -> bool:
        """Marks a request for `take_cancelled`; False if there is no such request (any more)."""
        with self._changed:
            if id not in self._alive:
                return False
            self._cancelled.add(id)
            self._changed.notify_all()
            return True

    def wait(self, timeout: float | None) -> bool:
        """Waits at most `timeout` seconds for a request; whether there is one."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._alive), timeout)

    def take(self, running: Sequence[str]) -> ActiveRequest | None:
        """Removes the next request from the queue; None if none waits.

        Its tenant holds the fewest rows of those that wait, and of several such was served longest
        ago; of its requests, it has waited longest. `running` are the tenants of the rows in use.
        """
        with self._changed:
            held, waiting = Counter(running), {r.encoded.tenant for r in self._waiting.values()}
            if not waiting:
                return None
            tenant = min(waiting, key=lambda t: (held[t], self._served.get(t, 0)))
            self._turn += 1
            self._served[tenant] = self._turn
            id = next(i for i, r in self._waiting.items() if r.encoded.tenant == tenant)
            return self._waiting.pop(id)

    def take_cancelled(self) -> list[ActiveRequest]:
        """Returns the requests marked by `cancel`; those that wait leave the queue."""
        with self._changed:
            cancelled = sorted(self._cancelled)
            self._cancelled.clear()
            for id in cancelled:
                self._waiting.pop(id, None)
            return [self._alive[id] for id in cancelled]

    def remove(self, id: int) -> None:
        """Forgets a request that has ended."""
        with self._changed:
            self._alive.pop(id, None)
            self._cancelled.discard(id)
