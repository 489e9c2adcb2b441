"""The requests of an engine that several threads share: waiting, running and cancelled ones."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

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

    def take(
        self,
        running: Sequence[str],
        rows: int,
        together: Callable[[Sequence[ActiveRequest]], int],
    ) -> list[ActiveRequest]:
        """Removes the next requests for `rows` free rows from the queue; none if none waits.

        Each is of the tenant that holds the fewest rows of those that wait, and of several such was
        served longest ago; of its requests, it has waited longest. `running` are the tenants of the
        rows in use. Of the requests in this order, `together` says how many to remove.
        """
        with self._changed:
            order = self._order(Counter(running), rows)
            taken = order[: together(order)] if order else []
            for request in taken:
                self._turn += 1
                self._served[request.encoded.tenant] = self._turn
                del self._waiting[request.id]
            return taken

    def _order(self, held: Counter[str], most: int) -> list[ActiveRequest]:
        """The requests of the next turns; `held` are the rows of each tenant."""
        waiting: dict[str, list[ActiveRequest]] = {}
        for request in reversed(self._waiting.values()):
            waiting.setdefault(request.encoded.tenant, []).append(request)
        served, order = dict(self._served), list[ActiveRequest]()
        while waiting and len(order) < most:
            tenant = min(waiting, key=lambda t: (held[t], served.get(t, 0)))
            held[tenant] += 1
            served[tenant] = self._turn + len(order) + 1
            order.append(waiting[tenant].pop())
            if not waiting[tenant]:
                del waiting[tenant]
        return order

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
