"""The frame of every command: one-line errors, exit statuses, consoles and interrupts."""

import _thread
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lookahead_jax.host.config_files import UsageError, usage_errors

EXPECTED = (ValueError, OSError, ImportError, NotImplementedError, MemoryError, FloatingPointError)
"""Failures whose message is enough; the type of any other error is named as well."""
INTERRUPTED = 130
Config = TypeVar("Config")


def run_command(
    parse: Callable[[], Config],
    work: Callable[[Config], object],
    *,
    prog: str,
    help_with: str = "",
    interrupted_with: str = "interrupted",
) -> int:
    """Parses, works, and returns the exit status: 0, 1 (failed), 2 (misused) or 130 (interrupted).

    A failure is one line on stderr, a warning too; LOOKAHEAD_DEBUG=1 adds the traceback. `parse`
    may end in tyro's SystemExit. Characters that the console cannot show are replaced.
    `help_with` is the command that shows help, `prog --help` by default; `interrupted_with` is what
    an interrupt is reported as.
    """
    _show_any_text()
    with _interrupts() as interrupted:
        try:
            with usage_errors():
                config = parse()
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *place: say(prog, f"notice: {message}")
                work(config)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _fail(prog, interrupted_with, status=INTERRUPTED)
        except Exception as error:
            if interrupted():  # the import system and JAX turn Ctrl-C into errors of their own
                return _fail(prog, interrupted_with, status=INTERRUPTED)
            return _failed(error, prog, help_with or f"{prog} --help")
    return 0


def end_process(status: int) -> None:
    """Ends the process of a command.

    After an interrupt it ends at once: XLA may still be computing in other threads, and they
    abort the process if the interpreter is torn down under them.
    """
    if status == INTERRUPTED:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def stopped_by_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks the work to stop, which polls for it; the second one interrupts.

    Where Ctrl-C is ignored, and outside of the main thread, it is never reported.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if received.is_set():
            before(number, frame)
        received.set()

    signal.signal(signal.SIGINT, stop)
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def say(prog: str, message: str) -> None:
    """Writes one line to stderr."""
    print(f"{prog}:", " ".join(message.split()), file=sys.stderr, flush=True)


def _failed(error: Exception, prog: str, help_with: str) -> int:
    """Reports an exception; the exit status."""
    if isinstance(error, UsageError):
        return _fail(prog, f"{error} (see {help_with})", status=2)
    if isinstance(error, BrokenPipeError):  # the reader left, as `head` does: nothing to flush to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    if not isinstance(error, EXPECTED):
        message = f"unexpected {type(error).__name__}: {error}"
    return _fail(prog, message, status=1)


def _fail(prog: str, message: str, *, status: int) -> int:
    if os.environ.get("LOOKAHEAD_DEBUG") == "1":
        traceback.print_exc()
    say(prog, f"error: {message}")
    return status


def _show_any_text() -> None:
    """Lets a console replace what its encoding lacks, instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Raises KeyboardInterrupt on Ctrl-C, again where it was lost; yields whether it came.

    Python drops an exception that is raised inside a finaliser or a callback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        received.set()
        raise KeyboardInterrupt

    def dropped(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            return hook_before(what)
        again = threading.Timer(0.05, _thread.interrupt_main)  # here it would be dropped again
        again.daemon = True
        again.start()

    hook_before = sys.unraisablehook
    handler_before = signal.getsignal(signal.SIGINT)
    own = handler_before is signal.default_int_handler  # a process that ignores Ctrl-C goes on
    sys.unraisablehook = dropped
    if own:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield received.is_set
    finally:
        sys.unraisablehook = hook_before
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)
