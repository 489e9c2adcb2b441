"""Drafts that are not run but compared with the emitted tokens; see node_choice.py."""

import time
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lookahead_jax.decoding.draft_estimates import TUNING
from lookahead_jax.decoding.draft_packing import followed
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.host_requests import HostRequests
from lookahead_jax.decoding.node_budget import RowChances, affordable, needed, place_groups
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.decoding.tree import NODE_BUCKETS


class Watched(NamedTuple):
    """The drafts of one step that was not run."""

    drafts: Sequence[Draft]  # one per row
    nodes: int
    seconds: float | None  # the time to make them; None if that included compilation


def judge(
    watched: Watched,
    texts: Sequence[np.ndarray],
    controller: Controller,
    chances: RowChances,
    sharing: int,
    *,
    goes_on: Container[int] = (),
    part: float = 1.0,
) -> list[int]:
    """Tells the controller how many of the watched nodes the texts agree with, and the chances.

    `texts` are the tokens that each row emitted behind its draft, `sharing` the rows that share a
    budget, of which `part` have a draft. Where a row `goes_on`, its text is not complete: a draft
    that agrees with all of it is not judged, unless it could not have gone further. Returns the
    tokens that a step with these nodes would have emitted in each row; 0: not judged.
    """
    begin = time.perf_counter()
    valid, taken = followed(watched.drafts, texts, watched.nodes)
    emitted = taken.sum(1)
    for row, text in enumerate(texts):
        if row in goes_on and text.size < watched.nodes and emitted[row] == text.size:
            valid[row] = taken[row] = emitted[row] = 0
    went = np.flatnonzero(emitted).tolist()
    gains, sizes = {}, {}
    if went:
        worth = chances.worth(watched.nodes) if sharing > 1 else None
        reached = (taken[..., None] & affordable(worth, valid, part)).sum((0, 1)) / len(went)
        drafts = [watched.drafts[row] for row in went]
        buckets = [n for n in controller.buckets if n <= watched.nodes]
        gains = {n: float(reached[NODE_BUCKETS.index(n)]) for n in buckets}
        sizes = {n: needed(drafts, n, buckets, sharing)[0] for n in buckets}
        groups = place_groups(watched.nodes)
        chances.learn(np.stack([valid @ groups, taken @ groups], axis=1), 1)
    seconds = watched.seconds
    if seconds is not None:
        seconds += time.perf_counter() - begin
    controller.record_watched(gains, sizes, seconds)
    return emitted.tolist()


class WatchedRows:
    """Watches a host drafter along tokens that plain steps emitted, where drafted steps had begun.

    There are as many drafts as the controller affords. A draft whose text is not long enough yet to
    tell what it is worth is made again when there is more: without it, only short ones would count.
    """

    def __init__(self, host: HostRequests, controller: Controller, chances: RowChances, batch: int):
        self._host, self._controller, self._chances = host, controller, chances
        self._seen = [0] * batch  # tokens of each row of which it is known what drafts were worth
        self._newest = TUNING.short_burst  # tokens of a burst

    def join(self, row: int, emitted: int) -> None:
        """A row joins that has emitted so many tokens."""
        # Drafted steps begin behind the first token, which follows from the prompt.
        self._seen[row] = max(emitted, 1)

    def drafted(self, counts: Sequence[int]) -> None:
        """A drafted step told what its drafts were worth; the rows have so many tokens now."""
        self._seen = list(counts)

    def watch_running(self, state: DecodeState, burst: int, sharing: int) -> None:
        """Watches along the tokens of rows that go on, after bursts of up to `burst` steps."""
        self._newest = max(burst, TUNING.short_burst)
        if not self._controller.affords_watching:
            return
        counts, done = np.asarray(state.count).tolist(), np.asarray(state.done).tolist()
        ready = [
            row
            for row, seen in enumerate(self._seen)
            if row in self._host and not done[row] and counts[row] - seen >= TUNING.short_burst
        ]
        if ready:
            tokens, limits = np.asarray(state.tokens), np.asarray(state.limit).tolist()
            texts = {row: tokens[row, : counts[row]] for row in ready}
            running = {row: limits[row] for row in ready}
            self._watch(texts, running, sharing, rows=done.count(False))

    def watch_ends(self, texts: Mapping[int, np.ndarray], sharing: int, rows: int) -> None:
        """Watches along the last tokens of rows that have ended with these texts, of `rows`."""
        limits = {row: len(text) for row, text in texts.items()}
        self._watch(texts, limits, sharing, rows=rows)

    def _watch(
        self,
        texts: Mapping[int, np.ndarray],
        limits: Mapping[int, int],
        sharing: int,
        *,
        rows: int,
    ) -> None:
        """Watches along the tokens of the newest burst, and those that were too few before.

        Rows with fewer tokens than their limit go on. A drafted step would have so many `rows`.
        """
        controller, nodes = self._controller, self._controller.watch
        goes_on = {row for row, text in texts.items() if len(text) < limits[row]}
        at = {
            # The drafter may know more than was seen, if a drafted step has failed.
            row: max(self._seen[row], self._host.observed(row), len(text) - self._newest - nodes)
            for row, text in texts.items()
            if row in self._host
        }
        at = {row: place for row, place in at.items() if place < len(texts[row])}
        while at and controller.affords_watching:
            drafts, seconds = self._host.propose(at, texts, limits, nodes)
            follow = [np.zeros(0, np.int32)] * len(self._seen)
            for row, place in at.items():
                follow[row] = texts[row][place : place + nodes]
            emitted = judge(
                Watched(drafts, nodes, seconds), follow, controller, self._chances, sharing,
                goes_on=goes_on, part=len(at) / rows,
            )  # fmt: skip
            for row, place in at.items():
                self._seen[row] = place + emitted[row]
            at = {
                row: self._seen[row]
                for row in at
                if emitted[row] and self._seen[row] < len(texts[row])
            }
