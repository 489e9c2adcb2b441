"""streaming_llm: attention sinks and the most recent tokens (arXiv 2309.17453)."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import LayerView, Policy, share


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """The first `sinks` tokens and the last C - sinks; the score of an entry is its position.

    Kept keys keep the RoPE phase of their original position (the original re-numbers them inside
    the cache). Sinks that would eat the budget are cut to C // 2.
    """

    decode_observers: ClassVar[Literal["nobody"]] = "nobody"

    sinks: int = 4
    """First prompt tokens, always kept."""

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative")

    def score(self, view: LayerView) -> jax.Array:
        recency = jnp.maximum(view.pos, 0).astype(jnp.float32)
        return jnp.broadcast_to(recency, view.k.shape[:3])

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return (pos >= 0) & (pos < share(self.sinks, budget))
