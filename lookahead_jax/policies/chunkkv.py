"""chunkkv: neighbouring entries are kept or dropped together (arXiv 2502.00299)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.blockwise import Blockwise
from lookahead_jax.policies.critical import Critical
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.wrapper import PolicyWrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkKV(PolicyWrapper):
    """Scores by another policy, averaged over chunks of the prompt that are kept or dropped whole.

    An entry scores the mean over its chunk, without protected entries and those that may not be
    kept. Of the last chunk that is kept, the first entries fill the budget. Each KV head chooses
    its own chunks (kvpress sums scores over heads first).
    """

    inner: Policy = dataclasses.field(default_factory=SnapKV)
    """The policy that scores, protects and shares the budget."""
    chunk_size: int = 20
    """Entries of a chunk. The first chunk starts at the beginning of the prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be at least 1")

    def why_not(self, policy: Policy) -> str | None:
        if isinstance(policy, ChunkKV):
            return "it averages over chunks itself"
        if isinstance(policy, Blockwise):
            return "it scores again for each block; put it in front, blockwise:chunkkv"
        if isinstance(policy, Critical):
            return "it chooses within chunks; put it in front, critical:chunkkv"
        return super().why_not(policy)

    def adjust(self, scores: jax.Array, pos: jax.Array, competing: jax.Array) -> jax.Array:
        scores = self.inner.adjust(scores, pos, competing)
        pos, competing = (jnp.broadcast_to(a, scores.shape) for a in (pos, competing))
        order = jnp.argsort(pos, axis=-1)
        pos, member, score = (
            jnp.take_along_axis(a, order, axis=-1) for a in (pos, competing, scores)
        )
        chunk = pos // self.chunk_size
        slot = jnp.arange(pos.shape[-1], dtype=jnp.int32)[None, None]
        before = jnp.pad(chunk[..., :-1], [(0, 0), (0, 0), (1, 0)], constant_values=-2)
        first = jax.lax.cummax(jnp.where(chunk != before, slot, 0), axis=2)

        def add(j, sums):  # in the same order for all entries of a chunk: their means are equal
            total, count = sums
            at = jnp.minimum(first + j, pos.shape[-1] - 1)
            here, other = (jnp.take_along_axis(a, at, axis=-1) for a in (member, chunk))
            here &= (other == chunk) & (at == first + j)
            total += jnp.where(here, jnp.take_along_axis(score, at, axis=-1), 0.0)
            return total, count + here.astype(jnp.float32)

        zeros = jnp.zeros(scores.shape, jnp.float32)
        total, count = jax.lax.fori_loop(0, self.chunk_size, add, (zeros, zeros))
        means = total / jnp.maximum(count, 1.0)
        means = jnp.take_along_axis(means, jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(competing, means, scores)
