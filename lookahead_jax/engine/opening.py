"""A request whose prompt is being read, a few pieces at a time."""

import time
from collections.abc import Generator

import numpy as np

from lookahead_jax.engine.prompt_reader import PrefilledRequest
from lookahead_jax.engine.requests import ActiveRequest


class Opening:
    """A request on its way from the queue to its row."""

    def __init__(
        self, request: ActiveRequest, pieces: Generator[None, None, tuple[PrefilledRequest, int]]
    ):
        self.request = request
        self._pieces = pieces

    def advance(self, seconds: float) -> PrefilledRequest | None:
        """Reads at least one piece, and more while they fit into `seconds`.

        Returns the request once its prompt has been read. A piece is expected to take as long as
        the one before it.
        """
        begin = now = time.perf_counter()
        while True:
            before = now
            try:
                next(self._pieces)
            except StopIteration as end:
                prefilled, self.request.reused_tokens = end.value
                self.request.kept_entries = float(np.asarray(prefilled.cache.length).mean())
                return prefilled
            now = time.perf_counter()
            if 2 * now - before - begin > seconds:
                return None

    def close(self) -> None:
        """Stops reading."""
        self._pieces.close()
