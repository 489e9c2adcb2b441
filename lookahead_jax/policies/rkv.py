"""rkv: what the last tokens attend to, less what later keys repeat (arXiv 2505.24133).

Source: R-KV and its public code (Zefan-Cai/R-KV), made for long reasoning.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.common import key_blocks, read_block
from lookahead_jax.policies.snapkv import PoolName, SnapKV
from lookahead_jax.policies.view import LayerView

_ROWS = 128  # keys that are compared with all others at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKV(SnapKV):
    """Keeps what the last tokens attend to and what no later entry repeats.

    A score is `attention` times the attention of the last `window` tokens (mean over these, pooled,
    maximum of the group) minus 1 - `attention` times the redundancy of the key: the softmax over
    all entries of its mean cosine to the other keys, as rotated. Each key leaves out the latest of
    those whose cosine to it exceeds `similar`, so that of several alike the latest stays. The
    window is kept and counts in C; a window of C or more is reduced to C // 2. Differences from the
    public code: attention is the model's own, per query head and over all entries, where the code
    takes the maximum of the group before the softmax and leaves the window out of it; a key without
    a similar one leaves none out, where the code leaves out the first entry.

    Meant for `--evict-every`; the prompt is cut by the same scores. The time grows with the square
    of the entries, as in the source; cuts while decoding see budget and interval alone.
    """

    presets: ClassVar = {}

    window: int = 8
    """Last tokens that observe, and are kept."""
    pool: PoolName = "max"
    """Smoothing of the attention along the entries."""
    attention: float = 0.1
    """Weight of attention; the rest is that of redundancy."""
    similar: float = 0.5
    """Cosine above which two keys are alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.attention <= 1:
            raise ValueError(f"attention={self.attention} must lie between 0 and 1")
        if not -1 <= self.similar <= 1:
            raise ValueError(f"similar={self.similar} must lie between -1 and 1, as cosines do")

    def score(self, view: LayerView) -> jax.Array:
        attention = self.window_scores(view, group="max")
        alike = redundancy(view.k, view.pos, self.similar)
        return self.attention * attention - (1 - self.attention) * alike


def redundancy(keys: jax.Array, pos: jax.Array, similar: float) -> jax.Array:
    """Softmax over the entries of each key's mean cosine to the others: float32 [B, K, T].

    `keys` [B, K, T, H], `pos` [B, K or 1, T] with -1 where empty. Of the cosines of one key, that
    to the latest other one above `similar` counts as 0.
    """
    pos = jnp.broadcast_to(pos, keys.shape[:3])
    filled = pos >= 0
    keys = jnp.where(filled[..., None], keys, jnp.zeros((), keys.dtype)).astype(jnp.float32)
    unit = keys / (jnp.linalg.norm(keys, axis=-1, keepdims=True) + 1e-8)
    size, count = key_blocks(pos.shape[-1], _ROWS)
    there = pos[:, :, None]  # [B, K, 1, T]

    def step(j, sums):
        (rows, here), fresh = read_block(j, size, pos.shape[-1], unit, pos[..., None])
        cosine = jnp.einsum("bkih,bksh->bkis", rows, unit, preferred_element_type=jnp.float32)
        cosine = jnp.where((here != there) & (there >= 0), cosine, 0.0)
        alike = jnp.where(cosine > similar, there, -1)
        latest = (alike == alike.max(-1, keepdims=True)) & (alike >= 0)
        counts = fresh[None, None, :, None] & (here >= 0) & ~latest
        return sums + jnp.where(counts, cosine, 0.0).sum(2)

    sums = jax.lax.fori_loop(0, count, step, jnp.zeros(pos.shape, jnp.float32))
    mean = sums / jnp.maximum(filled.sum(-1, keepdims=True), 1).astype(jnp.float32)
    return jax.nn.softmax(jnp.where(filled, mean, -jnp.inf), axis=-1, where=filled)
