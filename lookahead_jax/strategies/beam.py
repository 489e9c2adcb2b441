"""Beam search: the continuations of highest probability, as far as a few rows can hold them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.device_drafter import NoDrafter
from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.decoding.step import Steer, decode_step
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least
from lookahead_jax.strategies.primitives import gather_rows, replace_last, without_prompt
from lookahead_jax.strategies.rows import Rows


@dataclasses.dataclass(frozen=True)
class Record:
    """Changes nothing, and remembers the logits that chose the last token."""

    def __call__(self, state: Any, logits: jax.Array, last: jax.Array) -> tuple[Any, jax.Array]:
        return logits, logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam(Strategy):
    """The `n` most likely texts at each length; a finished one keeps its place in the beam.

    Texts are compared by the sum of their tokens' log-probabilities, in the end divided by
    length ** `length_penalty` (Wu et al. 2016, arXiv:1609.08144, without their coverage term;
    1 is the mean, as in transformers).
    """

    n: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_at_least("n", self.n, 1)
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty} must be a finite number")

    @property
    def rows(self) -> int:
        """Rows that decode together for each prompt."""
        return self.n

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """Records the logits."""
        return Record(), ()

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        if self.n > rows.model.config.vocab_size:
            raise ValueError(f"n={self.n} is more than the vocabulary: lower it")
        scores = jnp.where(jnp.arange(len(rows.finished)) % self.n == 0, 0.0, -jnp.inf)
        first, scores = choose_beams(
            without_prompt(rows.state),
            jnp.ones_like(rows.state.done),
            scores.astype(jnp.float32),
            n=self.n,
        )
        rows.replace(first)
        while rows.running.any():

            def move(params: Params, state: DecodeState) -> DecodeState:
                nonlocal scores
                state, scores = _step(params, state, scores, config=rows.model.config, n=self.n)
                return state

            rows.step(move)
        lengths = np.array([len(output.tokens) for output in rows.outputs])
        final = np.asarray(scores) / lengths**self.length_penalty
        return [Ranked(int(final[g].argmax()), final[g].tolist()) for g in rows.groups]


@program(static_argnames=("config", "n"), donate_argnames=("state",))
def _step(
    params: Params, state: DecodeState, scores: jax.Array, *, config: ModelConfig, n: int
) -> tuple[DecodeState, jax.Array]:
    live = ~state.done
    state, _ = decode_step(
        params, state, config=config, drafter=NoDrafter(), nodes=1, steer=Record()
    )
    return choose_beams(state, live, scores, n=n)


@program(static_argnames=("n",))
def choose_beams(
    state: DecodeState, live: jax.Array, scores: jax.Array, *, n: int
) -> tuple[DecodeState, jax.Array]:
    """The best `n` of every group's next texts, with their scores [R] float32.

    `live` [R] marks rows whose last token is still to be chosen; the others are texts themselves.
    """
    vocab = state.steering.shape[1]
    only_itself = jnp.where(jnp.arange(vocab) == 0, 0.0, -jnp.inf).astype(jnp.float32)[None]
    gain = jnp.where(live[:, None], jax.nn.log_softmax(state.steering), only_itself)
    total = (scores[:, None] + gain).reshape(-1, n * vocab)
    best, at = jax.lax.top_k(total, n)
    first = jnp.arange(total.shape[0], dtype=jnp.int32)[:, None] * n
    parents, tokens = (at // vocab + first).reshape(-1), (at % vocab).reshape(-1)
    state = gather_rows(state, parents.astype(jnp.int32), state.sampling)
    return replace_last(state, tokens.astype(jnp.int32), live[parents]), best.reshape(-1)
