"""How many nodes a step should have: the number that emits most tokens per second.

A number of nodes is worth what its steps emit over what they take, both moving averages. What
smaller trees would have emitted is read off the larger one that ran, since drafts list their best
nodes first; so only larger trees are ever tried for what they bring. Trials are paid from a purse
that a share of plain decoding fills: where nothing can be drafted, nothing else is lost.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lookahead_jax.tree import NODE_BUCKETS

SHARE = 0.025  # of plain decoding, for trials
PURSE = 3.0  # plain steps: the most that is saved up, or owed
TRIAL = 4  # steps
BETWEEN_TRIALS = 16  # steps after which a neighbour of the best is tried again, and then
LONGER = 2.0  # each time so many times as many,
AT_MOST = 128  # but no more than these
BETWEEN_PLAIN = 512  # and plain decoding
MEMORY = 0.15  # weight of the newest step, once there are some
GUESS = 0.1  # plain steps that a node costs, before any was measured
LEAST = 0.05  # drafted tokens per step that are told from none
FASTEST_OF = 3  # records
OUTLIER = 2.0  # a time this many times longer or shorter than expected is not believed whole


@dataclasses.dataclass
class _Cost:
    """Seconds of a step of one size."""

    seconds: float = 0.0
    records: int = 0

    def learn(self, seconds: float, steps: int) -> None:
        """The fastest at first, since what disturbs a step makes it longer; then an average."""
        self.records += 1
        if self.records <= FASTEST_OF:
            self.seconds = min(self.seconds or seconds, seconds)
            return
        expected = self.seconds
        believed = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        self.seconds += (1.0 - (1.0 - MEMORY) ** steps) * (believed - expected)


@dataclasses.dataclass
class _Choice:
    """What is known of trees of at most so many nodes."""

    gain: float | None = None  # tokens per step
    spent: float = 0.0  # seconds per step
    steps: int = 0
    since: int = BETWEEN_PLAIN  # steps since then
    trials: int = 0  # since it was the best

    @property
    def drafted(self) -> float:
        """Tokens per step that were drafted; not quite none, since it is divided by."""
        return 0.0 if self.gain is None else max(self.gain - 1.0, LEAST)

    def learn(self, gain: float, spent: float, steps: int) -> None:
        self.steps += steps
        self.since = 0
        # A mean at first, then a moving average.
        weight = max(1.0 - (1.0 - MEMORY) ** steps, steps / self.steps)
        before = (gain, spent) if self.gain is None else (self.gain, self.spent)
        self.gain = before[0] + weight * (gain - before[0])
        self.spent = before[1] + weight * (spent - before[1])


class Controller:
    """Chooses among `buckets`, of which 1 is plain decoding.

    Given to one call of `generate` after another it remembers what steps cost and drafts brought;
    the calls should have one model, one drafter and batches of one size. Not for several threads
    at a time.
    """

    def __init__(self, buckets: Sequence[int] = NODE_BUCKETS):
        if 1 not in buckets or not set(buckets) <= set(NODE_BUCKETS):
            raise ValueError(
                f"buckets {tuple(buckets)} must be some of {NODE_BUCKETS}, among them 1, which is "
                "plain decoding"
            )
        self._nodes = sorted(buckets)
        self._known = {nodes: _Choice() for nodes in self._nodes}
        self._plain = _Cost()
        self._drafted: dict[int, _Cost] = {}  # one node: a step for which nothing was drafted
        self._purse = 0.0  # plain steps
        self._trying: int | None = None
        self._left = 0  # steps of the trial

    @property
    def buckets(self) -> tuple[int, ...]:
        """What it chooses among, ascending."""
        return tuple(self._nodes)

    def choose(self, burst: int) -> tuple[int, int]:
        """The most nodes that the next steps may have, and how many steps: `burst`, or a trial's.

        The number of nodes is one of the buckets.
        """
        if self._known[1].gain is None:
            return 1, burst
        best = self.best()
        self._known[best].trials = 0
        if self._trying is None or self._payable(self._trying, best) < 1:
            self._trying, self._left = self._candidate(best), TRIAL
            if self._trying is not None:
                self._known[self._trying].trials += 1
        if self._trying is None or self._trying == 1:
            return self._trying or best, burst
        return self._trying, min(burst, self._left, max(1, self._payable(self._trying, best)))

    def best(self) -> int:
        """The bucket with the highest rate, as far as known."""
        rates = {n: k.gain / k.spent for n, k in self._known.items() if k.gain is not None}
        return max(rates, key=lambda nodes: rates[nodes], default=1)

    def record(
        self, most: int, nodes: int, gains: Mapping[int, float], steps: int, seconds: float | None
    ) -> None:
        """`steps` steps of `nodes` nodes took `seconds` each (None: not to be believed).

        `most` nodes were allowed; `gains` are the tokens per step and row that trees of at most so
        many nodes emitted, or would have emitted.
        """
        for known in self._known.values():
            known.since += steps
        if seconds is not None:
            cost = self._plain if most == 1 else self._drafted.setdefault(nodes, _Cost())
            cost.learn(seconds, steps)
        if most > 1:
            before = self._known[most].drafted
            for bucket, gain in gains.items():
                if bucket > 1 and bucket in self._known:
                    self._known[bucket].learn(gain, self._cost(min(bucket, nodes)), steps)
            after = self._known[most].drafted
            for bucket, known in self._known.items():  # a text that changes does so for all
                if bucket > most and bucket not in gains and known.gain is not None and before:
                    known.gain = 1.0 + known.drafted * after / before
        elif seconds is not None:
            self._known[1] = _Choice(1.0, self._plain.seconds, since=0)
        self._pay(most, nodes, gains, steps)

    def _pay(self, most: int, nodes: int, gains: Mapping[int, float], steps: int) -> None:
        emitted = gains.get(most, 1.0)
        self._purse += SHARE * steps * emitted
        if most == self._trying:
            if most > 1:
                self._purse += steps * (emitted - self._cost(nodes) / self._plain.seconds)
            self._left -= steps
            if most == 1 or self._left < 1:
                self._trying = None
        self._purse = min(max(self._purse, -PURSE), PURSE)

    def _candidate(self, best: int) -> int | None:
        """What to try instead of the best: a neighbour not seen for long, if there is money."""
        if best > 1 and self._known[1].since >= BETWEEN_PLAIN:
            return 1
        at = self._nodes.index(best)
        for nodes in (*self._nodes[at + 1 : at + 2], *self._nodes[max(at - 1, 0) : at]):
            known = self._known[nodes]
            old = known.since >= min(BETWEEN_TRIALS * LONGER**known.trials, AT_MOST)
            if nodes > 1 and old and self._payable(nodes, best) > 0:
                return nodes
        return None

    def _payable(self, nodes: int, best: int) -> int:
        """Steps of a trial that the purse pays for: what they lose against plain decoding."""
        known = self._known[nodes]
        cost = known.spent if known.gain is not None else self._cost(nodes)
        gain = known.gain
        if gain is None:
            gain = self._known[best].gain if nodes > best else None
        loss = cost / self._plain.seconds - (gain or 1.0)
        if loss <= 0:
            return TRIAL
        return max(int(min(self._purse / loss, TRIAL)), int(self._purse >= PURSE))

    def _cost(self, nodes: int) -> float:
        """Seconds of a drafted step, measured or between and beyond what was measured."""
        plain = self._plain.seconds
        known = {1: plain} | {n: cost.seconds for n, cost in self._drafted.items()}
        if nodes in self._drafted:
            return known[nodes]
        at = sorted(known)
        if nodes < at[-1]:
            return float(np.interp(nodes, at, [known[n] for n in at]))
        slope = (known[at[-1]] - plain) / (at[-1] - 1) if at[-1] > 1 else GUESS * plain
        return known[at[-1]] + max(slope, 0.0) * (nodes - at[-1])
