"""How many nodes a step should have: the number that emits most tokens per second.

The rate of a bucket P is (moving average of tokens emitted per step) / (moving average of its
measured seconds per step). Other buckets are tried now and then, smaller and larger neighbours of
the best one in turn, within an allowance: all that drafting has cost over plain decoding stays
below `SHARE` of the time plain decoding would have taken, and `HEAD_START` plain steps.
"""

import dataclasses
from collections.abc import Sequence

from lookahead_jax.tree import NODE_BUCKETS

SHARE = 0.015  # with the head start below 3 % from 270 tokens on
HEAD_START = 4.0  # plain steps that may be lost before anything was gained
BETWEEN_TRIALS = 16  # steps at the best bucket
MEMORY = 0.2  # weight of the newest measurement


@dataclasses.dataclass
class _Bucket:
    cost: float | None = None  # seconds per step
    gain: float = 1.0  # tokens per step
    runs: int = 0


class Controller:
    """Chooses among `buckets`, of which 1 is plain decoding."""

    def __init__(self, buckets: Sequence[int] = NODE_BUCKETS):
        if 1 not in buckets:
            raise ValueError(f"buckets {tuple(buckets)} lack 1, plain decoding")
        self._nodes = sorted(buckets)
        self._buckets = {nodes: _Bucket() for nodes in self._nodes}
        self._lost = 0.0  # plain steps that drafting has cost; negative: has saved
        self._emitted = 0.0
        self._since = BETWEEN_TRIALS
        self._trials = 0
        self._trying: int | None = None

    def choose(self) -> int:
        """The number of nodes of the next step."""
        if self._buckets[1].cost is None:
            return 1
        if self._trying is not None:
            return self._trying
        best = self.best()
        if self._since >= BETWEEN_TRIALS and (other := self._neighbour(best)) is not None:
            self._trying = other
            self._trials += 1
            self._since = 0
            return other
        return best

    def settled(self, nodes: int) -> bool:
        """Whether the cost of `nodes` is known and it is not on trial: steps can go in bursts."""
        return self._buckets[nodes].cost is not None and nodes != self._trying

    def best(self) -> int:
        """The bucket with the highest rate, as far as known."""
        known = {n: b.gain / b.cost for n, b in self._buckets.items() if b.cost}
        return max(known, key=lambda nodes: known[nodes], default=1)

    def record(self, nodes: int, steps: int, gain: float, seconds: float) -> None:
        """`steps` steps of `nodes` nodes took `seconds`, and emitted `gain` tokens each per row.

        The first record of a bucket holds its compilation; its time is not believed.
        """
        bucket = self._buckets[nodes]
        bucket.runs += 1
        fresh = MEMORY if bucket.runs > 2 else 1.0
        if nodes > 1:
            bucket.gain += fresh * (gain - bucket.gain)
        if bucket.runs == 1:
            return
        cost = seconds / steps
        bucket.cost = cost if bucket.cost is None else bucket.cost + fresh * (cost - bucket.cost)
        self._since += steps
        plain = self._buckets[1].cost
        if plain:
            self._emitted += steps * gain
            self._lost += steps * (cost / plain - gain) if nodes > 1 else 0.0
        if nodes == self._trying:
            self._trying = None

    def _neighbour(self, best: int) -> int | None:
        """A bucket next to `best`, if a trial of it is within the allowance."""
        at = self._nodes.index(best)
        beside = [self._nodes[i] for i in (at + 1, at - 1) if 0 <= i < len(self._nodes)]
        beside = [nodes for nodes in beside if nodes > 1]
        if not beside:
            return None
        nodes = beside[self._trials % len(beside)]
        bucket, plain = self._buckets[nodes], self._buckets[1].cost
        allowance = HEAD_START + SHARE * self._emitted - self._lost
        if bucket.cost is None or plain is None:  # one trial tells
            return nodes if allowance > 0 else None
        return nodes if bucket.cost / plain - bucket.gain <= allowance else None
