"""Ending a training run between two steps, on a signal."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from lookahead_jax.host.command import stopped_by_interrupt


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `requested(step)`: whether to stop after this step, the same on every process."""
    if jax.process_count() > 1:  # JAX has its own handler, and agrees on a step for all hosts
        yield multihost_utils.reached_preemption_sync_point
        return
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        with stopped_by_interrupt() as interrupted:
            yield lambda step: requested.is_set() or interrupted()
    finally:
        signal.signal(signal.SIGTERM, before)
