"""How many nodes a step should have: the number that emits most tokens per second.

A number of nodes is worth what its steps emit over what they take, both moving averages. What
smaller trees would have emitted is read off the larger one that ran, since drafts list their best
nodes first. While decoding is plain, a draft is made now and then, not run, and compared with what
was emitted after it: it is watched. Larger trees, drafts that cannot be watched, and numbers of
nodes that watching rules out for long are tried by running them. Watching and trials are paid from
a purse that a share of plain decoding fills: where nothing can be drafted, nothing else is lost.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lookahead_jax.decoding.tree import NODE_BUCKETS

SHARE = 0.015  # of plain decoding, for watching and trials
PURSE = 3.0  # plain steps: the most that is saved up
DEBT = 32.0  # plain steps: the most that watching is charged with, since it may be disturbed
TRIAL = 4  # steps, also of a number of nodes whose cost is a guess
WATCHED = 16  # nodes of a draft that is not run
BREAK = 0.5  # plain steps that it costs to stop for it and go on, besides
SPREAD = 0.618  # of a burst, from one such draft to the next: all places come up alike
PRIOR = 2  # steps that all before them count as, when drafting begins
TRUST = 2.0  # the most that what steps emit is expected to differ from what watching promised
TRUSTED = 0.5  # weight of the newest such difference
DOUBT = 512  # steps after which twice what watching promised is hoped for, in a trial
MARGIN = 1.2  # by which drafting must promise more than plain decoding, to begin
BETWEEN_TRIALS = 16  # steps after which a neighbour of the best is tried again, and then
LONGER = 2.0  # each time so many times as many,
AT_MOST = 128  # but no more than these
BETWEEN_PLAIN = 512  # and plain decoding
MEMORY = 0.15  # weight of the newest step, once there are some
GUESS = 0.1  # plain steps that a node costs, before any was measured
LEAST = 0.05  # drafted tokens per step that are told from none
OUTLIER = 2.0  # a time so many times longer than expected is not believed whole
SHORT = 8  # plain steps: fewer tell what it costs to begin them, and little about a draft


def _updated(known: float | None, newest: float, steps: int) -> float:
    """A moving average of times, for one of `steps` steps each.

    Disturbances make times longer: many steps in a row that were short are believed, many that were
    long count as one.
    """
    if known is None:
        return newest
    weight = MEMORY if newest > known else 1.0 - (1.0 - MEMORY) ** steps
    return known + weight * (min(newest, known * OUTLIER) - known)


@dataclasses.dataclass
class _Choice:
    """What is known of trees of at most so many nodes."""

    gain: float | None = None  # tokens per step
    share: float = 1.0  # of the cost of so many nodes, as drafts may have fewer
    steps: int = 0
    since: int = AT_MOST  # steps since it ran
    trials: int = 0  # since it was the best

    @property
    def drafted(self) -> float:
        """Tokens per step that were drafted; not quite none, since it is divided by."""
        return 0.0 if self.gain is None else max(self.gain - 1.0, LEAST)

    def learn(self, gain: float, share: float, steps: int) -> None:
        self.steps += steps
        # A mean at first, then a moving average.
        weight = max(1.0 - (1.0 - MEMORY) ** steps, steps / self.steps)
        before = (gain, share) if self.gain is None else (self.gain, self.share)
        self.gain = before[0] + weight * (gain - before[0])
        self.share = before[1] + weight * (share - before[1])


@dataclasses.dataclass
class _Trust:
    """Drafted tokens that steps emit for each that watching promised.

    Any token is as likely to be watched; a step is more likely to begin where the one before it
    failed. So watching promises more or less than steps bring, depending on the text.
    """

    factor: float = 1.0
    promise: float | None = None  # drafted tokens per step, of the steps that are compared with it
    kept: float = 0.0  # drafted tokens that they emitted
    steps: int = 0

    def begin(self, promise: float | None) -> None:
        self.promise, self.kept, self.steps = promise, 0.0, 0

    def learn(self, drafted: float, steps: int) -> None:
        """`steps` steps emitted `drafted` drafted tokens each."""
        self.kept += drafted * steps
        self.steps += steps
        if self.promise is not None and self.steps >= TRIAL:
            ratio = max(self.kept / self.steps, LEAST) / self.promise
            self.factor = min(max(self.factor * ratio**TRUSTED, 1.0 / TRUST), TRUST)
            self.promise = None


class Plan(NamedTuple):
    """What the next steps should be."""

    most: int  # nodes that a step may have; one of the buckets
    steps: int
    watch: int  # nodes of a draft to make before them and not to run; 0: none


class Controller:
    """Chooses among `buckets`, of which 1 is plain decoding.

    Given to one call of `generate` after another it remembers what steps cost and drafts brought;
    the calls should have one model, one drafter and batches of one size. Not for several threads
    at a time. Raises ValueError for buckets that are none, or without 1.
    """

    def __init__(self, buckets: Sequence[int] = NODE_BUCKETS):
        if 1 not in buckets or not set(buckets) <= set(NODE_BUCKETS):
            raise ValueError(
                f"buckets {tuple(buckets)} must be some of {NODE_BUCKETS}, among them 1, which is "
                "plain decoding"
            )
        self._nodes = sorted(buckets)
        self._known = {nodes: _Choice() for nodes in self._nodes}
        self._plain = 0.0  # seconds of a step; not known
        self._longest = 0  # plain steps in a row
        # Seconds of a step of so many nodes; of one: for which nothing was drafted.
        self._drafted: dict[int, float] = {}
        self._watched = 0  # drafts
        self._watch_cost = BREAK  # plain steps
        self._promised = False  # by what was watched since something drafted ran
        self._until: int | None = None  # plain steps before the next of them, if it is paid for
        self._drafting = False  # more than plain decoding was best
        self._trust = _Trust()
        self._purse = 0.0  # plain steps
        self._trying: int | None = None
        self._left = 0  # steps of the trial

    @property
    def buckets(self) -> tuple[int, ...]:
        """What it chooses among, ascending."""
        return tuple(self._nodes)

    def holding(self, nodes: int) -> int:
        """The smallest bucket for a tree of so many nodes."""
        return next(n for n in self._nodes if n >= nodes)

    @property
    def watch(self) -> int:
        """Nodes of a draft that is made and not run."""
        return min((n for n in self._nodes if n >= WATCHED), default=self._nodes[-1])

    def choose(self, burst: int, *, watchable: bool = True) -> Plan:
        """What the next up to `burst` steps should be.

        `watchable`: a draft can be judged without running it.
        """
        # A draft is worth what is emitted after it, so short bursts say little about it.
        watchable = watchable and burst >= SHORT and len(self._nodes) > 1
        if self._known[1].gain is None:
            return Plan(1, burst, 0)
        best = self.best()
        self._drafting = best > 1
        self._known[best].trials = 0
        if self._trying is None or self._payable(self._trying, best) < 1:
            self._trying, self._left = self._candidate(best, watchable), TRIAL
            if self._trying is not None:
                self._known[self._trying].trials += 1
        if self._trying is not None and self._trying > 1:
            paid = max(1, self._payable(self._trying, best))
            return Plan(self._trying, min(burst, self._left, paid), 0)
        nodes = self._trying or best
        if best == 1 and watchable:
            return self._plain_plan(burst)
        guessed = nodes > 1 and nodes not in self._drafted
        return Plan(nodes, min(burst, TRIAL) if guessed else burst, 0)

    def _plain_plan(self, burst: int) -> Plan:
        """Plain steps, up to or from a place where a draft is watched if that is paid for."""
        if self._until is None and self._purse >= min(self._watch_cost, PURSE):
            self._until = int(self._watched * SPREAD % 1.0 * burst)
        if self._until is None:
            return Plan(1, burst, 0)
        if self._until > 0:
            return Plan(1, min(burst, self._until), 0)
        return Plan(1, burst, self.watch)

    def best(self) -> int:
        """The bucket with the highest rate, as far as known."""
        rates = {
            n: known.gain / (known.share * self._cost(n))
            for n, known in self._known.items()
            if n > 1 and known.gain is not None
        }
        if self._known[1].gain is not None:
            rates[1] = (1.0 if self._drafting else MARGIN) / self._plain
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
        if seconds is not None and most > 1:
            self._drafted[nodes] = _updated(self._drafted.get(nodes), seconds, steps)
        elif seconds is not None and steps >= min(SHORT, self._longest):
            self._longest = max(self._longest, steps)
            self._plain = _updated(self._plain or None, seconds, steps)
        if most > 1:
            before = self._known[most].drafted
            if self._promised:
                self._promised, self._until = False, None
                self._trust.begin(before or None)
                for known in self._known.values():
                    known.steps = min(known.steps, PRIOR)
            self._trust.learn(gains[most] - 1.0, steps)
            for bucket, gain in gains.items():
                self._learn(bucket, gain, nodes, steps)
                if bucket > 1 and bucket in self._known:
                    self._known[bucket].since = 0
            after = self._known[most].drafted
            for bucket, known in self._known.items():  # a text that changes does so for all
                if bucket > most and bucket not in gains and known.gain is not None and before:
                    known.gain = 1.0 + known.drafted * after / before
        elif seconds is not None:
            self._known[1] = _Choice(1.0, since=0)
        if most == 1 and self._until is not None:
            self._until = max(self._until - steps, 0)
        self._pay(most, nodes, gains, steps)

    def record_watched(
        self, gains: Mapping[int, float], sizes: Mapping[int, int], seconds: float | None
    ) -> None:
        """A draft that was not run took `seconds` (None: not to be believed).

        Trees of at most so many nodes would have emitted `gains` tokens per row, by a step of
        `sizes` nodes: its first nodes, and what was emitted after it.
        """
        self._watched += 1
        self._promised, self._until = True, None
        cost = self._watch_cost if seconds is None else min(BREAK + seconds / self._plain, DEBT)
        self._watch_cost += MEMORY * (cost - self._watch_cost)
        self._purse -= cost
        for bucket, gain in gains.items():
            self._learn(bucket, 1.0 + self._trust.factor * (gain - 1.0), sizes[bucket], 1)

    def _learn(self, bucket: int, gain: float, nodes: int, steps: int) -> None:
        if bucket > 1 and bucket in self._known:
            share = self._cost(min(bucket, nodes)) / self._cost(bucket)
            self._known[bucket].learn(gain, share, steps)

    def _pay(self, most: int, nodes: int, gains: Mapping[int, float], steps: int) -> None:
        emitted = gains.get(most, 1.0)
        self._purse += SHARE * steps * emitted
        if most == self._trying:
            if most > 1:
                self._purse += steps * (emitted - self._cost(nodes) / self._plain)
            self._left -= steps
            if most == 1 or self._left < 1:
                self._trying = None
        self._purse = min(self._purse, PURSE)

    def _candidate(self, best: int, watchable: bool) -> int | None:
        """What to try instead of the best: a neighbour not seen for long, if there is money."""
        if best > 1 and self._known[1].since >= BETWEEN_PLAIN:
            return 1
        at = self._nodes.index(best)
        for nodes in (*self._nodes[at + 1 : at + 2], *self._nodes[max(at - 1, 0) : at]):
            known = self._known[nodes]
            old = known.since >= min(BETWEEN_TRIALS * LONGER**known.trials, AT_MOST)
            if best == 1 and watchable and not self._promising(nodes):
                continue
            if nodes > 1 and old and self._payable(nodes, best) > 0:
                return nodes
        return None

    def _promising(self, nodes: int) -> bool:
        """Whether so many nodes may pay although watching says that they do not."""
        known = self._known[nodes]
        cost = known.share * self._cost(nodes) / self._plain
        hope = 1.0 + known.since / DOUBT
        return known.gain is not None and known.gain * hope > cost

    def _payable(self, nodes: int, best: int) -> int:
        """Steps of a trial that the purse pays for: what they lose against plain decoding."""
        known = self._known[nodes]
        cost, gain = known.share * self._cost(nodes), known.gain
        if gain is None:
            gain = self._known[best].gain if nodes > best else None
        loss = cost / self._plain - (gain or 1.0)
        if loss <= 0:
            return TRIAL
        return max(int(min(self._purse / loss, TRIAL)), int(self._purse >= PURSE))

    def _cost(self, nodes: int) -> float:
        """Seconds of a step, measured or between and beyond what was measured."""
        if nodes in self._drafted:
            return self._drafted[nodes]
        below, less = 1, self._plain
        slope = GUESS * less
        for n in sorted(self._drafted):
            more = self._drafted[n]
            if n > below:
                slope = max(more - less, 0.0) / (n - below)
            if n > nodes:
                break
            below, less = n, more
        return less + slope * (nodes - below)
