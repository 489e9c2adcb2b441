"""AdaDec: greedy, and where the model is unsure a short look ahead after each candidate."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.decoding.step import Steer
from lookahead_jax.model.jit import program
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least
from lookahead_jax.strategies.likelihood import Likelihood, Listen, log_probability, nothing_drawn
from lookahead_jax.strategies.primitives import gather_rows, replace_last, without_prompt
from lookahead_jax.strategies.rows import Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaDec(Strategy):
    """The likeliest token; above an entropy, the candidate whose continuation is likeliest.

    From an entropy of `threshold` nats on, each of the `candidates` likeliest tokens is continued
    greedily by `ahead` tokens, or to its end. The token of the largest mean log-probability, its
    own included, is taken, and what followed it is forgotten. (He et al. 2025, arXiv:2506.08980,
    with a beam of 1. Thresholds learned there, as `lookahead train adadec` learns one, are from 0.6
    to 1.3 for models of 0.6B to 8B; 1 is a value to begin with. The rules by which
    their code ends a look ahead at the end of a Python function are left out.)
    """

    threshold: float = 1.0
    candidates: int = 3
    ahead: int = 5

    def __post_init__(self) -> None:
        check_at_least("threshold", self.threshold, 0)
        check_at_least("candidates", self.candidates, 1)
        check_at_least("ahead", self.ahead, 1)

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return self.candidates

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """Keeps the likelihood of what is chosen."""
        return Listen(GREEDY), nothing_drawn(texts.shape[0], vocab_size)

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        if self.candidates > rows.model.config.vocab_size:
            raise ValueError(f"candidates={self.candidates} is more than the vocabulary: lower it")
        others = np.arange(rows.groups.size) % self.candidates > 0
        decided = np.ones(rows.groups.size, bool)  # rows that have just chosen a token
        while decided.any():
            rows.refund(decided & others)  # all rows of a prompt have the same text
            log_p = np.asarray(rows.state.steering.log_p[rows.groups[:, 0]], np.float64)
            entropy = -(np.exp(log_p) * log_p).sum(1)
            unsure = decided & np.repeat(entropy >= self.threshold, self.candidates)
            if unsure.any():
                self._look_ahead(rows, unsure)
            decided = rows.running
            rows.advance(1)
        return [Ranked(0, [None]) for _ in rows.groups]

    def _look_ahead(self, rows: Rows, unsure: np.ndarray) -> None:
        """Chooses the last token of the `unsure` rows again."""
        chosen = jnp.asarray(unsure)
        before = gather_rows(rows.state, jnp.arange(len(unsure), dtype=jnp.int32))  # a copy
        rows.replace(_branched(without_prompt(rows.state), chosen, n=self.candidates))
        tokens, begin = np.array(rows.state.token), np.asarray(rows.state.count) - 1
        rows.hold(~unsure)
        rows.advance(self.ahead)
        score = np.asarray(log_probability(rows.state.steering, rows.state.token), np.float64)
        score = (score / (np.asarray(rows.state.count) - begin)).reshape(rows.groups.shape)
        best = np.repeat(rows.groups[:, 0] + score.argmax(1), self.candidates)
        rows.restore(replace_last(before, jnp.asarray(tokens[best]), chosen))


@program(static_argnames=("n",))
def _branched(state: DecodeState, rows: jax.Array, *, n: int) -> DecodeState:
    """Each of a prompt's `rows` ends with another of the `n` likeliest tokens."""
    log_p = state.steering.log_p
    place = jnp.arange(log_p.shape[0], dtype=jnp.int32) % n
    ids = jax.lax.top_k(log_p, n)[1]
    tokens = jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0].astype(jnp.int32)
    state = replace_last(state, tokens, rows)
    return dataclasses.replace(state, steering=Likelihood(log_p, jnp.zeros_like(log_p[:, 0])))
