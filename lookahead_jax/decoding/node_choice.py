"""The most draft nodes of a row in a step, chosen to emit the most tokens per second.

How many nodes a batch may have in all, and which rows get them, is said in node_budget.py.

The rate of a number of nodes is the tokens that its steps emit divided by their time, both moving
averages. A large tree also tells what smaller ones would have emitted, since drafts list their best
nodes first. During plain decoding, drafts are made without running them and compared with the
tokens emitted after them: they are watched. A device drafter drafts before a burst; a host drafter
drafts behind the steps, along the emitted text. Larger trees, drafts that cannot be watched, and
sizes that watching has ruled out for long are tried by running them. Watched drafts and trials may
take a fixed share of the time of plain decoding (the savings), which bounds the loss where drafting
does not help.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lookahead_jax.decoding.draft_estimates import (
    TUNING,
    NodeEstimate,
    PromiseRatio,
    updated_time,
)
from lookahead_jax.decoding.tree import NODE_BUCKETS


class Plan(NamedTuple):
    """The next steps."""

    most: int  # the most nodes that a row may have in a step; one of the buckets
    steps: int
    watch: int  # nodes of a draft to make before them without running it; 0: none


class Controller:
    """Chooses the nodes per step among `buckets`, of which 1 is plain decoding.

    Passed to several calls of `generate`, it keeps the measured costs and gains; these calls should
    share model, drafter and batch size. Not thread-safe. Raises ValueError for numbers that are
    not in `NODE_BUCKETS`, or without 1.
    """

    def __init__(self, buckets: Sequence[int] = NODE_BUCKETS):
        if 1 not in buckets or not set(buckets) <= set(NODE_BUCKETS):
            raise ValueError(
                f"buckets {tuple(buckets)} must be some of {NODE_BUCKETS}, among them 1, which is "
                "plain decoding"
            )
        self._nodes = sorted(buckets)
        self._known = {nodes: NodeEstimate() for nodes in self._nodes}
        self._plain = 0.0  # seconds of a step; not known
        self._longest = 0  # plain steps in a row
        # Nodes -> seconds of a step; 1: of a step for which nothing was drafted.
        self._drafted: dict[int, float] = {}
        self._watched = 0  # watched drafts so far
        self._watch_s = TUNING.watch_s  # of a watched draft
        self._promised = False  # a draft was watched since drafted steps last ran
        self._until: int | None = None  # plain steps before the next watched draft; None: not due
        self._drafting = False  # more than plain decoding was best
        self._ratio = PromiseRatio()
        self._savings = 0.0  # plain steps
        self._trying: int | None = None
        self._left = 0  # steps of the trial

    @property
    def buckets(self) -> tuple[int, ...]:
        """The numbers of nodes to choose among, ascending."""
        return tuple(self._nodes)

    @property
    def watch(self) -> int:
        """Nodes of a watched draft."""
        return min((n for n in self._nodes if n >= TUNING.watched_nodes), default=self._nodes[-1])

    @property
    def affords_watching(self) -> bool:
        """Whether the savings cover a watched draft, and a trial if one is due.

        Where drafted steps run, they tell more.
        """
        if len(self._nodes) == 1 or not self._plain or self._drafting:
            return False
        least = self._nodes[1]
        due = self._due(least) and self._promising(least)
        kept = min(max(self._loss(least, 1), 0.0), TUNING.max_savings) if due else 0.0
        return self._savings - kept >= min(self._watch_cost, TUNING.max_savings)

    @property
    def _watch_cost(self) -> float:
        """Plain steps that take as long as a watched draft."""
        return self._watch_s / self._plain

    def choose(self, burst: int, *, watchable: bool = True, behind: bool = False) -> Plan:
        """The plan for the next steps, at most `burst`.

        `watchable` says that a draft can be judged without running it, `behind` that this is done
        along the emitted text, whenever `affords_watching`: then the plan has no draft to watch.
        """
        # A draft is judged by the tokens emitted after it, so short bursts say little about it.
        watchable = watchable and (behind or burst >= TUNING.short_watch) and len(self._nodes) > 1
        if self._known[1].gain is None:
            return Plan(1, min(burst, TUNING.short_burst), 0)  # enough to measure a step
        best = self.best()
        self._drafting = best > 1
        self._known[best].gap = TUNING.trial_gap
        if self._trying is None or self._payable(self._trying, best) < 1:
            self._trying, self._left = self._candidate(best, watchable), TUNING.trial_steps
            if self._trying is not None:
                self._known[self._trying].tried()
        if self._trying is not None and self._trying > 1:
            guessed = self._trying not in self._drafted  # one step tells what they cost
            paid = 1 if guessed else max(1, self._payable(self._trying, best))
            return Plan(self._trying, min(burst, self._left, paid), 0)
        nodes = self._trying or best
        if best == 1 and watchable and not behind:
            return self._plain_plan(burst)
        if nodes > 1 and nodes not in self._drafted:  # what they cost is a guess: the least first
            nodes = next(n for n in self._nodes[1:] if n not in self._drafted)
            return Plan(nodes, min(burst, TUNING.trial_steps), 0)
        if nodes > 1:
            burst = min(burst, self._steps_that_pay(TUNING.interruption_s))
        return Plan(nodes, burst, 0)

    def _steps_that_pay(self, seconds: float) -> int:
        """Plain steps of which `seconds` are the share that may be spent on exploration."""
        steps = int(seconds / (TUNING.exploration * self._plain))
        return max(steps, TUNING.short_watch)

    def _plain_plan(self, burst: int) -> Plan:
        """Plain steps up to, or from, the next place for a watched draft, if savings cover it."""
        # As many steps as pay for a draft, where that is less than a burst.
        gap = min(burst, self._steps_that_pay(self._watch_s))
        if self._until is None and self.affords_watching:
            self._until = int(self._watched * TUNING.spread % 1.0 * burst) if gap == burst else 0
        if self._until is None:
            return Plan(1, gap, 0)
        if self._until > 0:
            return Plan(1, min(burst, self._until), 0)
        return Plan(1, gap, self.watch)

    def best(self) -> int:
        """The bucket with the highest rate, as far as known."""
        rates = {
            n: known.gain / (known.share * self._cost(n))
            for n, known in self._known.items()
            if n > 1 and known.gain is not None
        }
        if self._known[1].gain is not None:
            rates[1] = (1.0 if self._drafting else TUNING.margin) / self._plain
        return max(rates, key=lambda nodes: rates[nodes], default=1)

    def record(
        self, most: int, nodes: int, gains: Mapping[int, float], steps: int, seconds: float | None
    ) -> None:
        """`steps` steps of `nodes` nodes took `seconds` each (None: not measured).

        `most` nodes were allowed. `gains` maps a number of nodes to the tokens per step and row
        that trees of at most that size emitted, or would have emitted.
        """
        for known in self._known.values():
            known.since += steps
        if seconds is not None and most > 1:
            self._drafted[nodes] = updated_time(self._drafted.get(nodes), seconds, steps)
        elif seconds is not None and (
            steps >= min(TUNING.short_burst, self._longest) or steps * seconds >= TUNING.long_s
        ):
            self._longest = max(self._longest, steps)
            self._plain = updated_time(self._plain or None, seconds, steps)
        if most > 1:
            self._record_gains(most, nodes, gains, steps)
        elif seconds is not None:
            self._known[1] = NodeEstimate(1.0, since=0)
        if most == 1 and self._until is not None:
            self._until = max(self._until - steps, 0)
        self._pay(most, nodes, gains, steps)

    def _record_gains(self, most: int, nodes: int, gains: Mapping[int, float], steps: int) -> None:
        """The part of `record` that concerns drafted steps."""
        before = self._known[most].drafted
        if self._promised:
            self._promised, self._until = False, None
            self._ratio.begin(before or None)
            for known in self._known.values():
                known.steps = min(known.steps, TUNING.prior_steps)
        self._ratio.learn(gains[most] - 1.0, steps)
        for bucket, gain in gains.items():
            self._learn(bucket, gain, nodes, steps)
            if bucket > 1 and bucket in self._known:
                self._known[bucket].since = 0
        after = self._known[most].drafted
        for bucket, known in self._known.items():  # a change of the text concerns all sizes
            if bucket > most and bucket not in gains and known.gain is not None and before:
                known.gain = 1.0 + known.drafted * after / before

    def record_watched(
        self, gains: Mapping[int, float], sizes: Mapping[int, int], seconds: float | None
    ) -> None:
        """A draft that was not run took `seconds` (None: not measured), a pause for it included.

        `gains` and `sizes` map a number of nodes to the tokens per row that the draft's first nodes
        would have emitted, and to the nodes of the step that would have run them. They are empty if
        that is not known yet.
        """
        self._watched += 1
        self._promised, self._until = self._promised or bool(gains), None
        taken = self._watch_s if seconds is None else seconds
        taken = min(taken, TUNING.max_watch_cost * self._plain)
        self._watch_s += TUNING.time_memory * (taken - self._watch_s)
        self._savings -= taken / self._plain
        for bucket, gain in gains.items():
            self._learn(bucket, 1.0 + self._ratio.factor * (gain - 1.0), sizes[bucket], 1)

    def _learn(self, bucket: int, gain: float, nodes: int, steps: int) -> None:
        if bucket > 1 and bucket in self._known:
            share = self._cost(min(bucket, nodes)) / self._cost(bucket)
            self._known[bucket].learn(gain, share, steps)

    def _pay(self, most: int, nodes: int, gains: Mapping[int, float], steps: int) -> None:
        emitted = gains.get(most, 1.0)
        self._savings += TUNING.exploration * steps * emitted
        if most == self._trying:
            if most > 1:
                self._savings += steps * (emitted - self._cost(nodes) / self._plain)
            self._left -= steps
            if most == 1 or self._left < 1:
                self._trying = None
        self._savings = min(self._savings, TUNING.max_savings)

    def _candidate(self, best: int, watchable: bool) -> int | None:
        """The neighbour of the best size to try: one not run for long, if savings cover it."""
        if best > 1 and self._known[1].since >= TUNING.plain_gap:
            return 1
        at = self._nodes.index(best)
        for nodes in (*self._nodes[at + 1 : at + 2], *self._nodes[max(at - 1, 0) : at]):
            if best == 1 and watchable and not self._promising(nodes):
                continue
            if nodes > 1 and self._due(nodes) and self._payable(nodes, best) > 0:
                return nodes
        return None

    def _due(self, nodes: int) -> bool:
        """Whether this many nodes have not run for long."""
        return self._known[nodes].since >= self._known[nodes].gap

    def _promising(self, nodes: int) -> bool:
        """Whether this many nodes may pay off although watched drafts say that they do not."""
        known = self._known[nodes]
        cost = known.share * self._cost(nodes) / self._plain
        hope = 1.0 + known.since / TUNING.doubt_steps
        return known.gain is not None and known.gain * hope > cost

    def _payable(self, nodes: int, best: int) -> int:
        """Steps of a trial that the savings cover."""
        if (loss := self._loss(nodes, best)) <= 0:
            return TUNING.trial_steps
        return max(
            int(min(self._savings / loss, TUNING.trial_steps)),
            int(self._savings >= TUNING.max_savings),
        )

    def _loss(self, nodes: int, best: int) -> float:
        """Plain steps that a step of a trial is expected to lose."""
        known = self._known[nodes]
        cost, gain = known.share * self._cost(nodes), known.gain
        if gain is None:
            gain = self._known[best].gain if nodes > best else None
        return cost / self._plain - (gain or 1.0)

    def _cost(self, nodes: int) -> float:
        """Seconds of a step: measured, or interpolated between measured sizes."""
        if nodes in self._drafted:
            return self._drafted[nodes]
        below, less = 1, self._plain
        slope = TUNING.guessed_node_cost * less
        for n in sorted(self._drafted):
            more = self._drafted[n]
            if n > below:
                slope = max(more - less, 0.0) / (n - below)
            if n > nodes:
                break
            below, less = n, more
        return less + slope * (nodes - below)
