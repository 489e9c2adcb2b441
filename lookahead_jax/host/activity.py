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
AGAIN_S = 10.0
"""Seconds after which it is told again how far it is."""


@dataclasses.dataclass
class _Activity:
    what: str
    since: float
    progress: Callable[[], str] | None = None
    told: bool = False


class _Reporter:
    """Watches the innermost activity from a thread of its own."""

    def __init__(self, tell: Callable[[str], None], after_s: float, again_s: float):
        self._tell, self._after_s, self._again_s = tell, after_s, again_s
        self._stack: list[_Activity] = []
        self._finished = threading.Event()
        self.line_is_open = False
        """Whether the text on stdout ends in the middle of a line."""

    def begin(self, what: str, progress: Callable[[], str] | None) -> None:
        self._stack.append(_Activity(what, time.monotonic(), progress))

    def end(self) -> None:
        self._stack.pop()
        for outer in self._stack[-1:]:  # the time until here belonged to the inner one
            outer.since = time.monotonic()

    def finish(self) -> None:
        self._finished.set()

    def watch(self) -> None:
        while not self._finished.wait(self._after_s / 8):
            for activity in self._stack[-1:]:
                waits = self._again_s if activity.told else self._after_s
                over = activity.told and activity.progress is None
                if not over and time.monotonic() - activity.since >= waits:
                    activity.told, activity.since = True, time.monotonic()
                    if self.line_is_open and sys.stdout.isatty() and sys.stderr.isatty():
                        print(file=sys.stderr)
                    far = "" if activity.progress is None else activity.progress()
                    self._tell(activity.what + far)


_reporter: ContextVar[_Reporter | None] = ContextVar("reporter", default=None)


@contextlib.contextmanager
def telling(
    tell: Callable[[str], None], *, after_s: float | None = None, again_s: float = AGAIN_S
) -> Iterator[None]:
    """While the block runs, `tell` receives each activity that takes more than `after_s` seconds.

    It is called in another thread, once per activity, and of one that knows how far it is every
    `again_s` seconds. Default of `after_s`: AFTER_S.
    """
    reporter = _Reporter(tell, AFTER_S if after_s is None else after_s, again_s)
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
def activity(what: str, progress: Callable[[], str] | None = None) -> Iterator[None]:
    """Names what the block does; `progress` says how far it is, and is told after the name."""
    reporter = _reporter.get()
    if reporter is None:
        yield
        return
    reporter.begin(what, progress)
    try:
        yield
    finally:
        reporter.end()


def is_told() -> bool:
    """Whether anybody is told of activities here."""
    return _reporter.get() is not None


def printed(text: str) -> None:
    """Notes text that was written to stdout, so that what is told begins on a new line."""
    if (reporter := _reporter.get()) is not None and text:
        reporter.line_is_open = not text.endswith("\n")
