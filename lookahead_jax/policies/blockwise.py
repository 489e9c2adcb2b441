"""blockwise: entries compete block by block with those kept so far (arXiv 2504.15364)."""

import dataclasses

import jax
import jax.numpy as jnp

from lookahead_jax.policies.base import Policy, WithReplay
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.view import LayerView
from lookahead_jax.policies.wrapper import PolicyWrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blockwise(PolicyWrapper):
    """Scores by another policy, again for each block of entries beside the entries kept so far.

    A head first holds as many entries as its share of the budget; then a block of the next ones
    competes with those it holds, and so on. This matters for scores that depend on the other
    entries, such as keydiff's. All entries are scored once per block. The prompt itself is read
    whole. (KeyDiff, arXiv 2504.15364, works
    in this way, and the block press of kvpress.)
    """

    inner: Policy = dataclasses.field(default_factory=SnapKV)
    """The policy that scores, protects and shares the budget."""
    block_size: int = 128
    """Entries of a block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")

    def why_not(self, policy: Policy) -> str | None:
        if isinstance(policy.reading, WithReplay):
            return "its scores come from a second reading and cannot be repeated for a block"
        if isinstance(policy, Blockwise):
            return "it works in blocks itself"
        if type(policy).rerank not in (Policy.rerank, PolicyWrapper.rerank):
            return "it chooses in two stages, and a block has one"
        return super().why_not(policy)

    def rerank(self, ranked: jax.Array, budgets: jax.Array, view: LayerView) -> jax.Array:
        slot = jnp.arange(ranked.shape[-1], dtype=jnp.int32)[None, None]
        competing = jnp.isfinite(ranked) & (ranked < jnp.finfo(jnp.float32).max)

        def step(i, kept):
            there = slot < (budgets + (i + 1) * self.block_size)[..., None]
            fresh = there & (slot >= (budgets + i * self.block_size)[..., None])
            held = (kept | fresh) & (ranked > -jnp.inf)
            shown = view._replace(pos=jnp.where(held, view.pos, -1))
            scores = self.inner.adjust(self.inner.score(shown), shown.pos, held & competing)
            scores = jnp.maximum(scores, jnp.finfo(jnp.float32).min)
            scores = jnp.where(held & competing, scores, jnp.where(held, ranked, -jnp.inf))
            place = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
            return held & (place < budgets[..., None])

        first = slot < budgets[..., None]
        blocks = -(-(ranked.shape[-1] - budgets.min()) // self.block_size)
        kept = jax.lax.fori_loop(0, blocks, step, first)
        return jnp.where(kept | (ranked == jnp.inf), ranked, -jnp.inf)
