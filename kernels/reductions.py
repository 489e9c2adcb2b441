"""Pooling of the observers' probabilities along the prompt, and reduction over a group of heads.

Letters: B batch, N query heads, K KV heads, G = N / K, T entries.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Reduce = Literal["mean", "sum", "max"]
Pool = Literal["avg", "max"]
Group = Literal["mean", "max"]


def pool_scores(scores: jax.Array, valid: jax.Array, kind: Pool, kernel: int) -> jax.Array:
    """Smooths float32 scores [B, N, T] along T over the entries `valid` [B, N or 1, T].

    Stride 1, same length. Average pooling pads with zeros and always divides by `kernel`; max
    pooling pads with -inf. Entries that are not valid count as padding. `kernel` is odd.
    """
    shape, strides = (1, 1, kernel), (1, 1, 1)
    if kind == "avg":
        inside = jnp.where(valid, scores, 0.0)
        total = jax.lax.reduce_window(inside, 0.0, jax.lax.add, shape, strides, "SAME")
        return total / kernel
    inside = jnp.where(valid, scores, -jnp.inf)
    return jax.lax.reduce_window(inside, -jnp.inf, jax.lax.max, shape, strides, "SAME")


def reduce_group(scores: jax.Array, kv_heads: int, how: Group) -> jax.Array:
    """[B, N, T] per query head -> [B, K, T] per KV head."""
    b, n, t = scores.shape
    grouped_scores = scores.reshape(b, kv_heads, n // kv_heads, t)
    return grouped_scores.mean(2) if how == "mean" else grouped_scores.max(2)


@dataclasses.dataclass(frozen=True)
class Finish:
    """How scores of query heads become scores of KV heads."""

    pool: tuple[Pool, int] | None  # kind, and its width in entries: an odd number
    group: Group

    def __post_init__(self) -> None:
        if self.pool is not None and self.pool[1] % 2 == 0:
            raise ValueError(f"a pooling width must be odd, not {self.pool[1]}")

    def __call__(self, scores: jax.Array, valid: jax.Array, kv_heads: int) -> jax.Array:
        """[B, N, T] -> [B, K, T]; the entries `valid` [B, K or 1, T] take part in the pooling."""
        if self.pool is not None:
            if valid.shape[1] > 1:
                valid = jnp.repeat(valid, scores.shape[1] // kv_heads, axis=1)
            scores = pool_scores(scores, valid, *self.pool)
        return reduce_group(scores, kv_heads, self.group)
