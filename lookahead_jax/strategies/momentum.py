"""Momentum Decoding: greedy, against a resistance that grows with the repeated n-gram."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.decoding.step import NEVER, Steer
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least
from lookahead_jax.strategies.rows import Rows


class Texts(NamedTuple):
    """The text of every row so far, all but its last token at the beginning of a step."""

    tokens: jax.Array  # [B, W] int32, -1 padded
    length: jax.Array  # [B] int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(Strategy):
    """Of the `k` likeliest tokens v the one with the largest p(v) - alpha * r(v).

    The resistance r(v) is the length of the longest n-gram, up to `longest`, that v would complete
    a second time in the text, prompt included (Lan et al. 2022, arXiv:2212.02175; the table of
    their code for GPT2-XL).
    """

    k: int = 5
    alpha: float = 0.2
    longest: int = 5

    def __post_init__(self) -> None:
        check_at_least("k", self.k, 1)
        check_at_least("alpha", self.alpha, 0)
        check_at_least("longest", self.longest, 1)

    def steering(
        self, texts: jax.Array, room: int, sampling: Sampling, vocab_size: int
    ) -> tuple[Steer | None, Any]:
        """The resistance, and the texts without their last tokens."""
        length = (texts >= 0).sum(1, dtype=jnp.int32) - 1
        at = jnp.arange(texts.shape[1], dtype=jnp.int32)[None]
        tokens = jnp.where(at < length[:, None], texts, -1)
        tokens = jnp.pad(tokens, ((0, 0), (0, room)), constant_values=-1)
        return Resistance(self.k, self.alpha, self.longest), Texts(tokens, length)

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        if self.k > rows.model.config.vocab_size:
            raise ValueError(f"k={self.k} is more than the vocabulary: lower it")
        rows.advance()
        return [Ranked(0, [None]) for _ in rows.groups]


@dataclasses.dataclass(frozen=True)
class Resistance:
    """Replaces the logits of the k likeliest tokens by p - alpha * r, and excludes the others."""

    k: int
    alpha: float
    longest: int

    def __call__(self, state: Texts, logits: jax.Array, last: jax.Array) -> tuple[Texts, jax.Array]:
        rows = jnp.arange(last.shape[0])
        tokens = state.tokens.at[rows, state.length].set(last, mode="drop")
        length = state.length + 1
        p, ids = jax.lax.top_k(jax.nn.softmax(logits), self.k)
        repeated = repeated_lengths(tokens, length, ids, longest=self.longest)
        scores = p - self.alpha * repeated.astype(p.dtype)
        steered = jnp.full_like(logits, NEVER).at[rows[:, None], ids].set(scores)
        return Texts(tokens, length), steered


def repeated_lengths(
    tokens: jax.Array, length: jax.Array, ids: jax.Array, *, longest: int
) -> jax.Array:
    """Length [B, k] int32 of the longest n-gram that each id would repeat after its text.

    `tokens` int32 [B, W] hold texts of `length` [B] tokens.
    """
    width = tokens.shape[1]
    at = jnp.arange(width, dtype=jnp.int32)[None]
    same = jnp.ones_like(tokens, bool)
    before = jnp.zeros_like(tokens)  # tokens before each position that equal those at the end
    for back in range(1, longest):
        end = jnp.take_along_axis(tokens, jnp.maximum(length - back, 0)[:, None], axis=1)
        there = jnp.take_along_axis(
            tokens, jnp.maximum(at - back, 0).repeat(len(tokens), 0), axis=1
        )
        same &= (there == end) & (at >= back) & (length[:, None] >= back)
        before += same.astype(jnp.int32)
    occurs = (tokens[:, None] == ids[..., None]) & (at < length[:, None])[:, None]
    return jnp.where(occurs, before[:, None] + 1, 0).max(-1)
