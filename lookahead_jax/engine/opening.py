"""Requests whose prompts are being read, a few pieces at a time."""

import time
from collections.abc import Generator, Sequence

from lookahead_jax.engine.prompt_reader import PrefilledRequest, ReadRequest
from lookahead_jax.engine.requests import ActiveRequest


class Opening:
    """Requests on their way from the queue to their rows; one reading serves them all."""

    def __init__(
        self,
        requests: Sequence[ActiveRequest],
        pieces: Generator[None, None, list[ReadRequest]],
    ):
        self.requests = list(requests)
        """Those that have not ended."""
        self._read = tuple(requests)
        self._pieces = pieces

    def advance(self, seconds: float) -> list[tuple[ActiveRequest, PrefilledRequest]] | None:
        """Reads at least one piece, and more while they fit into `seconds`.

        Returns the requests once their prompts have been read, without those dropped. A piece is
        expected to take as long as the one before it.
        """
        begin = now = time.perf_counter()
        while True:
            before = now
            try:
                next(self._pieces)
            except StopIteration as end:
                return self._results(end.value)
            now = time.perf_counter()
            if 2 * now - before - begin > seconds:
                return None

    def drop(self, request: ActiveRequest) -> None:
        """Forgets a request that has ended; without the last, stops reading."""
        self.requests.remove(request)
        if not self.requests:
            self._pieces.close()

    def _results(self, results: list[ReadRequest]) -> list[tuple[ActiveRequest, PrefilledRequest]]:
        read = []
        for request, result in zip(self._read, results, strict=True):
            if request in self.requests:
                request.reused_tokens, request.kept_entries = result.reused, result.kept
                read.append((request, result.prefilled))
        return read
