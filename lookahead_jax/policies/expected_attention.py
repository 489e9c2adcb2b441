"""expected_attention: what queries like the prompt's would attend to (arXiv 2510.00636)."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.common import KEY_BLOCK, key_blocks, read_block
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.rope import apply_rope, rope_tables
from lookahead_jax.policies.base import Policy, protected_share, visible_to_next
from lookahead_jax.policies.view import Chunk, LayerView


class Moments(NamedTuple):
    """Running mean and spread of queries before RoPE."""

    count: jax.Array  # [B] float32
    mean: jax.Array  # [B, N, H] float32
    spread: jax.Array  # [B, N, H, H] float32, sum of outer products of deviations


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Keeps what future queries are expected to attend to, weighted by the norm of the value.

    Queries before RoPE (after the q-norm), the first `sinks` left out, are taken as Gaussian
    with mean mu and covariance S; R is the mean RoPE matrix of the next `future` positions. With
    scale a, a key scores exp(a k.R mu + a^2 k.R S R'k / 2), normalised over the entries that may
    be kept (sinks left out), averaged over the group, plus epsilon, times |v|. Sinks are always
    kept and score 0. Follows kvpress, which divides the covariance by the number of queries.
    A soft-cap on the logits is not part of the closed form and is left out; a model's attention
    sinks count in the normalisation.
    """

    sinks: int = 4
    """First prompt tokens, always kept and left out of the statistics."""
    future: int = 512
    """Positions after the prompt over which the RoPE matrix is averaged."""
    epsilon: float = 0.0
    """Added to the expected attention before it is multiplied by the value norm."""
    values: Literal["norm", "none"] = "norm"
    """Whether the norm of the value is a factor of the score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0 or self.future < 1 or not 0 <= self.epsilon < float("inf"):
            raise ValueError("sinks and epsilon must not be negative, future must be at least 1")

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> Moments:
        n, h = config.num_heads, config.head_dim
        return Moments(
            jnp.zeros(batch, jnp.float32),
            jnp.zeros((batch, n, h), jnp.float32),
            jnp.zeros((batch, n, h, h), jnp.float32),
        )

    def accumulate(self, stats: Moments, chunk: Chunk) -> Moments:
        """Merges a chunk's moments with what came before (Chan et al. 1979: no cancellation)."""
        weight = (chunk.q_pos >= self.sinks).astype(jnp.float32)
        q = chunk.q_unrotated.astype(jnp.float32)
        new = weight.sum(1)
        total = stats.count + new
        mean = jnp.einsum("bp,bpnh->bnh", weight, q) / jnp.maximum(new, 1.0)[:, None, None]
        deviation = (q - mean[:, None]) * weight[:, :, None, None]
        shift = mean - stats.mean
        part = (new / jnp.maximum(total, 1.0))[:, None, None]
        between = jnp.einsum("bnh,bni->bnhi", shift * part, shift)
        spread = jnp.einsum("bpnh,bpni->bnhi", deviation, deviation)
        return Moments(
            total,
            stats.mean + shift * part,
            stats.spread + spread + between * stats.count[:, None, None, None],
        )

    def score(self, view: LayerView) -> jax.Array:
        if view.stats is None:
            raise ValueError("expected_attention scores with all prompt queries; a cache has none")
        logits = _expected_logits(view, *self._future_queries(view))  # [B, K, G, T]
        counted = visible_to_next(view.pos, view.length, view.window) & (view.pos >= self.sinks)
        logits = jnp.where(counted[:, :, None], logits, -jnp.inf)
        peak = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
        sinks = None
        if view.sink_logits is not None:
            sinks = view.sink_logits.astype(jnp.float32).reshape(1, *peak.shape[1:3], 1)
            peak = jnp.maximum(peak, sinks)
        mass = jnp.exp(logits - peak)
        total = mass.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sinks - peak)
        share_of = mass / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        scores = share_of.mean(2) + self.epsilon
        if self.values == "norm":
            scores = scores * jnp.linalg.norm(view.v.astype(jnp.float32), axis=-1)
        return jnp.where(counted, scores, 0.0)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return (pos >= 0) & (pos < protected_share(self.sinks, budget))

    def _future_queries(self, view: LayerView) -> tuple[jax.Array, jax.Array]:
        """Mean [B, N, H] and covariance [B, N, H, H] of queries turned by the mean RoPE matrix."""
        steps = jnp.arange(self.future, dtype=jnp.int32)
        cos, sin = rope_tables(view.config, view.length[:, None] + steps[None], view.span)
        # RoPE is linear in its cosines and sines: their mean is the mean rotation.
        cos, sin = (t[view.rope].mean(1, keepdims=True) for t in (cos, sin))

        def turn(x):  # [B, ..., H] along the last axis
            flat = x.reshape(x.shape[0], 1, -1, x.shape[-1])
            interleaved = view.config.rope_interleaved
            return apply_rope(flat, cos, sin, interleaved=interleaved).reshape(x.shape)

        count = jnp.maximum(view.stats.count, 1.0)[:, None, None, None]
        covariance = turn(view.stats.spread / count)
        return turn(view.stats.mean), turn(covariance.swapaxes(-1, -2))


def _expected_logits(view: LayerView, mean: jax.Array, covariance: jax.Array) -> jax.Array:
    """a k.mean + a^2 k'cov k / 2, float32 [B, K, G, T], a block of keys at a time."""
    b, heads, total, h = view.k.shape
    scale = view.config.attn_scale
    mean = mean.reshape(b, heads, -1, h)
    covariance = covariance.reshape(b, heads, -1, h, h)
    size, count = key_blocks(total, KEY_BLOCK)

    def step(j, logits):
        (k,), _ = read_block(j, size, total, view.k)
        k = k.astype(jnp.float32)
        turned = jnp.einsum("bksh,bkghi->bkgsi", k, covariance)
        part = scale * jnp.einsum("bksh,bkgh->bkgs", k, mean)
        part += 0.5 * scale**2 * jnp.einsum("bkgsi,bksi->bkgs", turned, k)
        start = jnp.minimum(j * size, total - size)
        return jax.lax.dynamic_update_slice_in_dim(logits, part, start, axis=3)

    empty = jnp.zeros((*mean.shape[:3], total), jnp.float32)
    return jax.lax.fori_loop(0, count, step, empty)
