"""Says what a command is doing once it is slow, so that it does not look hung.

Library code names what it does with `activity`. Nothing is said unless a command runs inside
`telling`, and nothing for what is done in other threads.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

AFTER_S = 2.0
"""Seconds after which something takes long."""


@dataclasses.dataclass
class _Activity:
    what: str
    since: float
    told: bool = False


class _Reporter:
    """Watches the innermost activity from a thread of its own."""

    def __init__(self, tell: Callable[[str], None], after_s: float):
        self._tell, self._after_s = tell, after_s
        self._stack: list[_Activity] = []
        self._finished = threading.Event()
        self.line_is_open = False
        """Whether the text on stdout ends in the middle of a line."""

    def begin(self, what: str) -> None:
        self._stack.append(_Activity(what, time.monotonic()))

    def end(self) -> None:
        self._stack.pop()
        for outer in self._stack[-1:]:  # the time until here belonged to the inner one
            outer.since = time.monotonic()

    def finish(self) -> None:
        self._finished.set()

    def watch(self) -> None:
        while not self._finished.wait(self._after_s / 8):
            for activity in self._stack[-1:]:
                if not activity.told and time.monotonic() - activity.since >= self._after_s:
                    activity.told = True
                    if self.line_is_open and sys.stdout.isatty() and sys.stderr.isatty():
                        print(file=sys.stderr)
                    self._tell(activity.what)


_reporter: ContextVar[_Reporter | None] = ContextVar("reporter", default=None)


@contextlib.contextmanager
def telling(tell: Callable[[str], None], *, after_s: float | None = None) -> Iterator[None]:
    """While the block runs, `tell` receives each activity that takes more than `after_s` seconds.

    It is called once per activity, in another thread. Default: AFTER_S.
    """
    reporter = _Reporter(tell, AFTER_S if after_s is None else after_s)
    thread = threading.Thread(target=reporter.watch, name="activity", daemon=True)
    token = _reporter.set(reporter)
    thread.start()
    try:
        yield
    finally:
        _reporter.reset(token)
        reporter.finish()
        thread.join()


@contextlib.contextmanager
def activity(what: str) -> Iterator[None]:
    """Names what the block does."""
    reporter = _reporter.get()
    if reporter is None:
        yield
        return
    reporter.begin(what)
    try:
        yield
    finally:
        reporter.end()


def printed(text: str) -> None:
    """Notes text that was written to stdout, so that what is told begins on a new line."""
    if (reporter := _reporter.get()) is not None and text:
        reporter.line_is_open = not text.endswith("\n")
