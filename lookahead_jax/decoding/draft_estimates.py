"""Measurements behind the choice of the number of draft nodes, and its constants."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Constants of the choice. Costs are in plain steps: the time of a step of one node."""

    exploration: float = 0.015
    """Share of plain decoding that may be spent on watched drafts and trials."""
    max_savings: float = 3.0
    """The most plain steps that are saved up for watched drafts and trials."""
    max_watch_cost: float = 32.0
    """The most that one watched draft is charged, since a disturbance may have made it slow."""
    trial_steps: int = 4
    """Steps of a trial, and of a burst of nodes whose cost is a guess."""
    watched_nodes: int = 16
    """Nodes of a watched draft."""
    watch_s: float = 0.4e-3
    """Seconds of a watched draft before any was measured."""
    interruption_s: float = 0.25e-3
    """Seconds that leaving a burst for a watched draft and resuming take, on top of the draft."""
    short_watch: int = 4
    """Fewest tokens that a device drafter's watched draft is compared with, unless a text ends."""
    spread: float = 0.618
    """Fraction of a burst from one watched draft to the next: all places are equally frequent."""
    prior_steps: int = 6
    """Steps that all earlier estimates count as, when drafting begins."""
    max_trust: float = 1.3
    """Largest ratio expected between what drafted steps emit and what watched drafts promised."""
    trust_weight: float = 0.5
    """Weight of the newest such ratio."""
    doubt_steps: int = 512
    """Steps without a run after which twice the promised gain is assumed, to justify a trial."""
    margin: float = 1.2
    """How much faster than plain decoding drafting must promise to be before it begins."""
    trial_gap: int = 16
    """Steps until a neighbour of the best number of nodes is tried again."""
    gap_growth: float = 2.0
    """Factor by which this gap grows with every trial of it."""
    max_trial_gap: int = 128
    """Largest gap between two trials, in steps."""
    plain_gap: int = 512
    """Drafted steps until plain decoding is measured again."""
    memory: float = 0.06
    """Weight of the newest step in a moving average of tokens per step."""
    time_memory: float = 0.15
    """Weight of the newest step in a moving average of times."""
    guessed_node_cost: float = 0.1
    """Cost of one more node before any was measured."""
    least_drafted: float = 0.05
    """Smallest number of drafted tokens per step, so that ratios stay finite."""
    outlier: float = 2.0
    """Largest ratio of a time to its average that a moving average believes."""
    short_burst: int = 8
    """Plain steps of a burst that may be too short to measure its own overhead.

    Host drafts are watched along as many tokens at least, unless a text ends.
    """
    long_s: float = 4e-3
    """Seconds of a burst that are enough, whatever its steps."""


TUNING = Tuning()


def updated_time(known: float | None, newest: float, steps: int) -> float:
    """A moving average of times per step, after one of `steps` steps.

    Disturbances make times longer: many steps in a row that were short are believed, many that were
    long count as one.
    """
    if known is None:
        return newest
    memory = TUNING.time_memory
    weight = memory if newest > known else 1.0 - (1.0 - memory) ** steps
    return known + weight * (min(newest, known * TUNING.outlier) - known)


@dataclasses.dataclass
class NodeEstimate:
    """What is known of trees of at most so many nodes."""

    gain: float | None = None  # tokens per step
    share: float = 1.0  # of the cost of so many nodes, as drafts may have fewer
    steps: int = 0
    since: int = TUNING.max_trial_gap  # steps since it ran
    gap: float = TUNING.trial_gap  # steps until it is tried again; grows until it is the best

    @property
    def drafted(self) -> float:
        """Drafted tokens per step; not quite 0, since it is divided by."""
        return 0.0 if self.gain is None else max(self.gain - 1.0, TUNING.least_drafted)

    def tried(self) -> None:
        """A trial of it begins."""
        self.gap = min(self.gap * TUNING.gap_growth, TUNING.max_trial_gap)

    def learn(self, gain: float, share: float, steps: int) -> None:
        """`steps` steps had this gain and this share of the cost."""
        self.steps += steps
        # A mean at first, then a moving average.
        weight = max(1.0 - (1.0 - TUNING.memory) ** steps, steps / self.steps)
        before = (gain, share) if self.gain is None else (self.gain, self.share)
        self.gain = before[0] + weight * (gain - before[0])
        self.share = before[1] + weight * (share - before[1])


@dataclasses.dataclass
class PromiseRatio:
    """Drafted tokens that steps emit for each one that watched drafts promised.

    Every token is equally likely to be where a device drafter is watched, but a drafted step is
    more likely to begin where the one before it failed. So watching promises more or less than
    steps bring, depending on the text.
    """

    factor: float = 1.0
    promise: float | None = None  # drafted tokens per step, of the steps that are compared with it
    kept: float = 0.0  # drafted tokens that they emitted
    steps: int = 0

    def begin(self, promise: float | None) -> None:
        """The next steps are compared with this promise."""
        self.promise, self.kept, self.steps = promise, 0.0, 0

    def learn(self, drafted: float, steps: int) -> None:
        """`steps` steps emitted `drafted` drafted tokens each."""
        self.kept += drafted * steps
        self.steps += steps
        if self.promise is not None and self.steps >= TUNING.trial_steps:
            ratio = max(self.kept / self.steps, TUNING.least_drafted) / self.promise
            factor = self.factor * ratio**TUNING.trust_weight
            self.factor = min(max(factor, 1.0 / TUNING.max_trust), TUNING.max_trust)
            self.promise = None
