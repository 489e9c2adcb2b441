"""Cautious Next Token Prediction: where the model is unsure, several trials up to punctuation."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.step import Steer
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least
from lookahead_jax.strategies.likelihood import (
    Likelihood,
    Listen,
    log_probability,
    nothing_drawn,
    taken,
)
from lookahead_jax.strategies.rows import Rows

PUNCTUATION = (".", ",", "\n", "?", "!", ":", ";", ")", "]", "}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cautious(Strategy):
    """Draws a token where its distribution has little entropy, else several trials.

    From entropy `low` to `high` (nats) their number grows from 1 to `max_trials`. A trial ends with
    a punctuation mark that is a token of its own, or with the text; that of least perplexity goes
    on. (Wang et al. 2025, arXiv:2507.03038; constants of their code, sampling of Llama 3.1, which
    they used.)
    """

    default_sampling: ClassVar[Sampling] = Sampling(temperature=0.6, top_p=0.9)
    draws: ClassVar[bool] = True
    max_trials: int = 10
    low: float = 0.01
    high: float = 1.5

    def __post_init__(self) -> None:
        check_at_least("max_trials", self.max_trials, 1)
        if not 0 <= self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: give 0 <= low < high")

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return self.max_trials

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """Keeps the likelihood of what is drawn."""
        if sampling.repetition_penalty != 1.0:
            raise ValueError("Cautious compares likelihoods: leave the repetition penalty out")
        return Listen(sampling), nothing_drawn(texts.shape[0], vocab_size)

    def trials(self, log_p: np.ndarray) -> int:
        """How many trials to begin at a distribution [V]."""
        kept = log_p[log_p > -np.inf]
        entropy = -(np.exp(kept) * kept).sum()
        share = np.clip((entropy - self.low) / (self.high - self.low), 0.0, 1.0)
        return int(1 + (self.max_trials - 1) * share)

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        marks = punctuation_ids(rows.model.tokenizer)
        begin = np.zeros(rows.groups.size, np.int64)  # of the trials
        drawn = np.ones(rows.groups.size, bool)
        while True:
            # `drawn` are rows that have just drawn a token; a prompt's after the same text.
            first = np.asarray(rows.state.steering.log_p[rows.groups[:, 0]], np.float64)
            width = np.array([self.trials(log_p) for log_p in first])
            in_use = np.arange(self.max_trials)[None] < width[:, None]
            unused = drawn & ~in_use.reshape(-1)
            rows.refund(unused)
            rows.hold(unused)
            alone = np.repeat(width == 1, self.max_trials)

            def ends(row: int, alone: np.ndarray = alone) -> bool:
                return bool(alone[row]) or rows.outputs[row].tokens[-1] in marks

            rows.pause(ends)
            rows.advance(until=ends)
            loss = -np.asarray(log_probability(rows.state.steering, rows.state.token), np.float64)
            loss /= np.maximum(np.asarray(rows.state.count) - begin, 1)
            best = np.where(in_use, loss.reshape(in_use.shape), np.inf).argmin(1)
            rows.gather(np.repeat(rows.groups[:, 0] + best, self.max_trials))
            begin = np.array(rows.state.count)
            rows.steer_from(_between(rows.state.steering, rows.state.token))
            rows.resume()
            if not (drawn := rows.running).any():
                return [Ranked(0, [None]) for _ in rows.groups]
            rows.advance(1)


@jax.jit
def _between(state: Likelihood, token: jax.Array) -> Likelihood:
    """The next trial begins after the last token, whose probability is added when it is read."""
    return state._replace(total=-taken(state, token))


def punctuation_ids(tokenizer: Any) -> set[int]:
    """The punctuation marks that are one token; ValueError if there are none."""
    if tokenizer is None:
        raise ValueError("trials end with punctuation, and this model has no tokenizer.json")
    rows = [tokenizer.encode(mark, special=False) for mark in PUNCTUATION]
    if not (ids := {row[0] for row in rows if len(row) == 1}):
        raise ValueError("no punctuation mark is one token of this model: trials would not end")
    return ids
