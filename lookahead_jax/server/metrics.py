"""Counts and times of a server, in Prometheus's text format."""

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Result

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The counts of one server, even if a process has several.

    `places` tells how many places of rows and queue are taken.
    """

    def __init__(self, engine: Engine, places: Callable[[], int]):
        self._registry = CollectorRegistry()
        self._responses = self._counter(
            "http_responses", "Answers by path and status.", "path", "status"
        )
        self._finished = self._counter(
            "continuations", "Continuations by how they ended.", "finish"
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were read or reused.")
        self._reused = self._counter(
            "reused_prompt_tokens", "Of these, read by an earlier request."
        )
        self._generated = self._counter("generated_tokens", "Generated tokens.")
        self._steps = self._counter("steps", "Model steps, counted once for every row.")
        self._queue = self._seconds("queue_seconds", "Time until the prompt begins to be read.")
        self._first = self._seconds("first_token_seconds", "Time until the first token.")
        self._total = self._seconds("continuation_seconds", "Time until the end of a continuation.")
        self._pause = self._seconds(
            "prompt_pause_seconds", "Time that running continuations waited for prompts per burst."
        )
        self._gap = self._seconds(
            "stream_gap_seconds", "Time between two pieces of a streamed continuation."
        )
        self._accepted = self._histogram(
            "tokens_per_step",
            "Tokens per step of a continuation; above 1, drafts were accepted.",
            (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8),
        )
        self._evicted = self._histogram(
            "evicted_share",
            "Share of a prompt's entries that eviction dropped.",
            (0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99),
        )
        gauges = {
            "places": (
                "Places of rows and queue that continuations have taken, from their arrival on.",
                places,
            ),
            "waiting": ("Continuations that wait for a row.", lambda: engine.waiting),
            "running": (
                "Continuations that are read or decoded.",
                lambda: max(engine.alive - engine.waiting, 0),
            ),
            "prompt_store_bytes": ("Bytes of stored prompts.", lambda: engine.prompt_store.bytes),
            "prompt_store_hits": (
                "Prompts that were stored when they were asked for.",
                lambda: engine.prompt_store.hits,
            ),
            "prompt_store_misses": (
                "Prompts that were not.",
                lambda: engine.prompt_store.misses,
            ),
            "prefix_store_bytes": (
                "Bytes of stored chunks of prompts.",
                lambda: engine.prefix_store.bytes,
            ),
            "prefix_store_hits": (
                "Chunks that were stored when they were asked for.",
                lambda: engine.prefix_store.hits,
            ),
            "prefix_store_misses": ("Chunks that were not.", lambda: engine.prefix_store.misses),
            "cache_bytes": ("Bytes of the rows' caches.", lambda: engine.cache_bytes),
        }
        for name, (text, read) in gauges.items():
            Gauge(f"lookahead_{name}", text, registry=self._registry).set_function(read)

    def responded(self, path: str, status: int) -> None:
        """Counts an answer; 499 stands for a client that left before it."""
        self._responses.labels(path, str(status)).inc()

    def ended(self, result: Result) -> None:
        """Counts a continuation that has ended."""
        self._finished.labels(result.finish).inc()
        self._generated.inc(len(result.tokens))
        self._steps.inc(result.steps)
        if result.steps:  # the prompt brings the first token
            self._accepted.observe((len(result.tokens) - 1) / result.steps)
        if result.kept_entries is not None:
            self._evicted.observe(1 - result.kept_entries / result.prompt_tokens)
        self._total.observe(result.timing.ended_s)
        if result.timing.started_s is not None:
            self._prompt.inc(result.prompt_tokens)
            self._reused.inc(result.reused_tokens)
            self._queue.observe(result.timing.started_s)
        if result.timing.first_token_s is not None:
            self._first.observe(result.timing.first_token_s)

    def paused(self, seconds: float) -> None:
        """One pause of the running continuations, for a prompt to be read."""
        self._pause.observe(seconds)

    def gaps(self) -> "StreamGaps":
        """What measures the gaps of one stream."""
        return StreamGaps(self._gap)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lookahead_{name}", text, labels, registry=self._registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, _SECONDS)

    def _histogram(self, name: str, text: str, buckets: Sequence[int | float]) -> Histogram:
        return Histogram(f"lookahead_{name}", text, registry=self._registry, buckets=buckets)


class StreamGaps:
    """Observes the time between the pieces of each continuation of one stream."""

    def __init__(self, seconds: Histogram):
        self._seconds = seconds
        self._last: dict[int, float] = {}

    def piece(self, index: int) -> None:
        """A piece of continuation `index` is about to be sent."""
        now = time.perf_counter()
        if index in self._last:
            self._seconds.observe(now - self._last[index])
        self._last[index] = now
