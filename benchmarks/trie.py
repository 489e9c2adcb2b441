"""Memory and time of the host drafters: fills a trie and a suffix tree to a million nodes.

The text is synthetic: tokens of a Zipf distribution, with repeated phrases. Cold is the filling of
an empty store, warm the time at its bound, where every new node evicts another. Both insert 3
tokens per call, as a decoding step does. Times are given as wall time and as process time, because
on a busy machine they differ.

    python benchmarks/trie.py --out benchmarks/results/trie.json
"""

import dataclasses
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
from common import Help, commit, parse, processor, publish, settings

from lookahead_jax.drafters.suffix import Suffix
from lookahead_jax.drafters.trie import Trie

VOCABULARY, PHRASES, PHRASE = 50_000, 2_000, 20
STEP, OUTPUT = 3, 400  # tokens per call, and of the output of a request


def text(tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Zipf tokens; about a third of them belong to repeated phrases."""
    chance = 1 / np.arange(1, VOCABULARY + 1)
    drawn = rng.choice(VOCABULARY, tokens, p=chance / chance.sum()).astype(np.int32)
    phrases = rng.choice(drawn, (PHRASES, PHRASE))
    at = 0
    while at + PHRASE < tokens:
        drawn[at : at + PHRASE] = phrases[rng.integers(PHRASES)]
        at += int(rng.integers(PHRASE, 5 * PHRASE))
    return drawn


class Clocks:
    """Wall time and process time in seconds, summed over many short intervals."""

    def __init__(self):
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self):
        self._begin = time.perf_counter(), time.process_time()

    def __exit__(self, *_):
        self.wall.append(time.perf_counter() - self._begin[0])
        self.cpu.append(time.process_time() - self._begin[1])

    def each(self, tokens: int) -> dict[str, float]:
        """Microseconds per token."""
        return {
            "wall": round(1e6 * sum(self.wall) / (len(self.wall) * tokens), 2),
            "process": round(1e6 * sum(self.cpu) / (len(self.cpu) * tokens), 2),
        }

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Milliseconds."""
        return {
            name: {f"p{q}": round(1e3 * float(np.percentile(times, q)), 4) for q in (50, 99, 100)}
            for name, times in (("wall", self.wall), ("process", self.cpu))
        }


def requests(drafter, tokens: np.ndarray, clocks: Clocks, until) -> int:
    """Requests observe `tokens` in turn until `until()`; returns the number of tokens."""
    at, request = 0, 0
    while not until() and at + OUTPUT <= tokens.size:
        drafter.begin(request, [])
        for i in range(at, at + OUTPUT, STEP):
            with clocks:
                drafter.observe(request, tokens[i : i + STEP])
        drafter.end(request)
        at, request = at + OUTPUT, request + 1
    return at


def measure(drafter, capacity: int, nodes: int, depth: int, rng: np.random.Generator) -> dict:
    tokens = text(4_000_000, rng)
    cold, warm, propose = Clocks(), Clocks(), Clocks()
    full = int(0.99 * capacity)
    at = requests(drafter, tokens, cold, lambda: drafter.size >= full)
    report = {"nodes": drafter.size, "tokens_to_fill": at}
    limit = time.perf_counter() + 10
    requests(drafter, tokens[at:], warm, lambda: time.perf_counter() > limit)
    fresh, drafted = text(30_000, rng), []
    drafter.begin("measured", fresh[:2_000])
    for i in range(2_000, 2_000 + 5_000 * STEP, STEP):
        drafter.observe("measured", fresh[i : i + STEP])
        with propose:
            drafted.append(len(drafter.propose("measured", nodes, depth).tokens))
    drafter.end("measured")
    return report | {
        "bytes_per_node": round(drafter.nbytes / capacity, 1),
        "insert_us_per_token": {"cold": cold.each(STEP), "warm": warm.each(STEP)},
        "propose_ms": propose.percentiles(),
        "nodes_proposed": {
            "mean": round(float(np.mean(drafted)), 1),
            "full": round(float(np.mean(np.equal(drafted, nodes))), 3),
        },
    }


def machine() -> dict[str, str]:
    return {
        "cpu": processor(),
        "commit": commit(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "numba": version("numba"),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    capacity: Annotated[int, Help("nodes of the store")] = 1 << 20
    nodes: Annotated[int, Help("nodes of a proposal")] = 64
    depth: Annotated[int, Help("depth of a proposal")] = 12
    seed: Annotated[int, Help("seed of the text")] = 0
    note: Annotated[str, Help("how busy the machine is, for the report")] = ""
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def main() -> None:
    options = parse(Options, __doc__)
    report = {**machine(), "settings": settings(options, "out")}
    for kind in (Trie, Suffix):
        small = kind(capacity=1_000)  # compiles
        small.begin(0, [1, 2, 1])
        small.observe(0, np.array([2], np.int32))
        small.propose(0, options.nodes, options.depth)
        small.end(0)
        rng = np.random.default_rng(options.seed)
        report[kind.__name__.lower()] = measure(
            kind(capacity=options.capacity), options.capacity, options.nodes, options.depth, rng
        )
    publish(report, options.out, indent=2)


if __name__ == "__main__":
    main()
