"""Particle filtering: samples grow step by step and are resampled by the reward of their steps."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least, check_share
from lookahead_jax.strategies.primitives import gather_rows
from lookahead_jax.strategies.rows import Rows

_EDGE = 1e-7  # rewards are kept this far from 0 and 1


class Steps:
    """Where each row's step begins in its text, and whether the step has ended."""

    def __init__(self, rows: Rows, end: str):
        self._rows, self._end = rows, end
        self._begin = [0] * len(rows.finished)

    def begin(self) -> None:
        """The next steps begin where the texts end."""
        self._begin = [len(output.text) for output in self._rows.outputs]

    def ended(self, row: int) -> bool:
        """Whether the row's step has come to its end."""
        return self._end in self._rows.outputs[row].text[self._begin[row] :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticleFilter(Strategy):
    """`n` particles; after each step they are resampled by the odds of their rewards.

    A step ends with the string `step`; after `max_steps` of them a particle is at its end. The
    reward, between 0 and 1, is that of the text so far; a particle's weight is r / (1 - r). Ended
    particles keep their weight and take part. When all have ended, `select` takes the one of
    largest weight ("best"), or draws one ("sample"). (Puri et al. 2025, arXiv:2502.01618; defaults
    and order of steps, the resampling after the last one included, as in its_hub.)
    """

    default_sampling: ClassVar[Sampling] = Sampling(temperature=0.8)
    draws: ClassVar[bool] = True
    drafts: ClassVar[bool] = True
    reads_reward: ClassVar[bool] = True
    n: int = 8
    step: str = "\n\n"
    max_steps: int = 32
    select: Literal["best", "sample"] = "best"

    def __post_init__(self) -> None:
        check_at_least("n", self.n, 1)
        check_at_least("max_steps", self.max_steps, 1)
        if not self.step:
            raise ValueError("step is empty: give the string that ends a step")

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return self.n

    def temperature(self, weights: np.ndarray, turn: int) -> float:
        """By what the log-weights are divided before the `turn`-th resampling; from 1."""
        return 1.0

    def guide(self, rows: Rows, log_weights: np.ndarray, steps: Steps) -> np.ndarray:
        """What is added to the log-weights [G, n] for the next resampling only."""
        return np.zeros_like(log_weights)

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        log_weights = np.zeros(rows.groups.shape)
        steps, turn = Steps(rows, self.step), 0
        rows.pause(steps.ended)
        while (open_groups := ~rows.finished.reshape(log_weights.shape).all(1)).any() or turn == 0:
            moved = ~rows.finished if turn else np.ones_like(rows.finished)
            rows.advance(until=steps.ended)
            turn += 1
            here = np.flatnonzero(moved).tolist()
            log_weights.reshape(-1)[here] = [_log_odds(r) for r in rows.score(here)]
            if turn == self.max_steps:
                rows.end(np.ones_like(rows.finished))
            modulated = log_weights + self.guide(rows, log_weights, steps)
            index = rows.groups.copy()
            for g in np.flatnonzero(open_groups | (turn == 1)).tolist():
                drawn = rows.rng(g, turn).choice(
                    self.n, self.n, p=self._chances(modulated[g], turn)
                )
                index[g], log_weights[g] = rows.groups[g][drawn], log_weights[g][drawn]
            rows.gather(index.reshape(-1))
            steps.begin()
            rows.resume()
        return [self._ranked(rows, g, log_weights[g], turn) for g in range(len(log_weights))]

    def _chances(self, log_weights: np.ndarray, turn: int) -> np.ndarray:
        return _softmax(log_weights / self.temperature(_softmax(log_weights), turn))

    def _ranked(self, rows: Rows, group: int, log_weights: np.ndarray, turn: int) -> Ranked:
        best = int(log_weights.argmax())
        if self.select == "sample":
            best = int(rows.rng(group, 0).choice(self.n, p=_softmax(log_weights)))
        return Ranked(best, (1 / (1 + np.exp(-log_weights))).tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropicParticleFilter(ParticleFilter):
    """A particle filter that flattens the weights while few particles hold most of them early on.

    Entropic Annealing (Giannone et al. 2025, arXiv:2510.05825): where the effective sample size is
    below `ess_threshold` * n and the step t below `early_phase` * max_steps, log-weights are
    divided by max(1, n / ESS * (1 - t / max_steps)).

    `look_ahead` "on" is their optional Look-ahead Modulation: before a resampling each particle
    makes one step more, the reward of this successor multiplies its weight, as in an auxiliary
    particle filter, and the step is forgotten. The authors' code has none of it. These are choices
    made here: the factor is r / (1 - r) too, annealing acts on the product, the successor has noise
    of its own, an ended particle is its own successor, and no factor remains in later weights.
    """

    ess_threshold: float = 0.5
    early_phase: float = 0.5
    look_ahead: Literal["off", "on"] = "off"

    def guide(self, rows: Rows, log_weights: np.ndarray, steps: Steps) -> np.ndarray:
        """The log-odds of the successors, for prompts that have not ended."""
        going = ~rows.finished
        if self.look_ahead == "off" or not going.any():
            return np.zeros_like(log_weights)
        rows.resume()
        before = gather_rows(rows.state, jnp.arange(len(going), dtype=jnp.int32))  # a copy
        sampling = rows.state.sampling
        seeds = jax.device_put(_successor_seeds(np.asarray(sampling.seed)), sampling.seed.sharding)
        sampling = dataclasses.replace(sampling, seed=seeds)
        rows.replace(dataclasses.replace(rows.state, sampling=sampling))
        steps.begin()
        rows.advance(until=steps.ended)
        guide, moved = log_weights.copy(), np.flatnonzero(going)
        guide.reshape(-1)[moved] = [_log_odds(r) for r in rows.score(moved.tolist())]
        rows.restore(before)
        return np.where(going.reshape(guide.shape).any(1, keepdims=True), guide, 0.0)

    def temperature(self, weights: np.ndarray, turn: int) -> float:
        """By what the log-weights are divided before the `turn`-th resampling; from 1."""
        share = 1 / np.square(np.clip(weights, _EDGE, 1 - _EDGE)).sum() / self.n
        progress = turn / self.max_steps
        if self.n == 1 or share >= self.ess_threshold or progress >= self.early_phase:
            return 1.0
        return max(1.0, (1 - progress) / share)


def _successor_seeds(seeds: np.ndarray) -> np.ndarray:
    """Other noise for each row: a particle's next step is not the one that was looked at."""
    place = 2**32 - 1  # no row of a prompt is there (`place_seeds`)
    draws = [np.random.SeedSequence([int(seed), place]).generate_state(1)[0] for seed in seeds]
    return np.array(draws, seeds.dtype)


def _log_odds(reward: float) -> float:
    reward = min(max(check_share(reward), _EDGE), 1 - _EDGE)
    return float(np.log(reward / (1 - reward)))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
