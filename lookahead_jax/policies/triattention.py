"""triattention: what typical queries at many distances to come would attend to (TriAttention).

Source: "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression" and its public
code (WeianMao/triattention). Queries before RoPE lie close to a fixed centre for each head.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.rope import apply_rope, inverse_frequencies, rope_tables
from lookahead_jax.policies.base import CutByEntries, DecodeCut, Policy, protected_share
from lookahead_jax.policies.statistics_file import check_shape, load_statistics
from lookahead_jax.policies.view import Chunk, LayerView

COMMAND = "`lookahead train triattention`"
MEAN, NORMS = "query_mean", "query_norms"  # [L, N, H] and [L, N, F], names in the file
_LEAST_DEVIATION = 1e-6


class QueryCentre(NamedTuple):
    """Sums over queries before RoPE. F pairs of dimensions turn together."""

    count: jax.Array  # [B] float32
    queries: jax.Array  # [B, N, H] float32
    norms: jax.Array  # [B, N, F] float32 of the norms of the pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriAttention(Policy):
    """Keeps what queries like those of other texts would attend to, from many positions to come.

    Queries before RoPE are taken to lie around their mean. A key scores its product with the mean
    query, averaged over the positions 1, 2, 4, ... `reach` after the text that the query is turned
    to: a sum of cosines of the distance, one for each frequency. Added to it, for each pair of
    dimensions that turn together, is the norm of the key times E|q| - |E q|. Scores are
    standardised over the entries for each query head; the maximum of the group counts. The last
    `window` tokens are kept and count in C; a window of C or more is reduced to C // 2.

    Meant for `--evict-every`, with statistics from `lookahead train triattention`. Without `file`
    the prompt's own queries take the place of other texts, and nothing is evicted while decoding.
    Difference from the public code: dimensions that RoPE does not turn count in the product.
    """

    file: str = ""
    """Safetensors file with the statistics; default: the queries of the prompt give them. It is
    read once in a process."""
    window: int = 128
    """Last tokens, always kept."""
    reach: int = 65536
    """The furthest position after the text, of those that are averaged over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0 or not 1 <= self.reach < 2**24:
            raise ValueError(
                f"window={self.window} must not be negative and reach={self.reach} lie between 1 "
                "and 2**24"
            )
        if self.file:
            _load(self.file)

    @property
    def decode_cut(self) -> DecodeCut | None:
        return CutByEntries() if self.file else None

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> QueryCentre | None:
        if self.file:
            return None
        heads = (batch, config.num_heads)
        return QueryCentre(
            jnp.zeros(batch, jnp.float32),
            jnp.zeros((*heads, config.head_dim), jnp.float32),
            jnp.zeros((*heads, config.ropes[0].dim // 2), jnp.float32),
        )

    def accumulate(self, stats: QueryCentre | None, chunk: Chunk) -> QueryCentre | None:
        if stats is None:
            return None
        there = chunk.q_pos >= 0
        q = jnp.where(there[:, :, None, None], chunk.q_unrotated.astype(jnp.float32), 0.0)
        return QueryCentre(
            stats.count + there.sum(1).astype(jnp.float32),
            stats.queries + q.sum(1),
            stats.norms + pair_norms(q, chunk.config).sum(1),
        )

    def score(self, view: LayerView) -> jax.Array:
        config = view.config
        mean, norms = self._centre(view)
        future, factor = self._turned(mean, view)
        # Both the query and the cached key carry the attention factor of the RoPE table.
        spread = factor[:, None, None] * (norms - pair_norms(mean, config))

        def by_group(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0], config.num_kv_heads, -1, x.shape[-1])

        k = view.k.astype(jnp.float32)
        scores = jnp.einsum("bksh,bkgh->bkgs", k, by_group(future))
        scores += jnp.einsum("bksf,bkgf->bkgs", pair_norms(k, config), by_group(spread))
        filled = (view.pos >= 0)[:, :, None]
        average = scores.mean(-1, keepdims=True, where=filled)
        deviation = scores.std(-1, keepdims=True, where=filled)
        standard = (scores - average) / jnp.maximum(deviation, _LEAST_DEVIATION)
        return jnp.where(filled, standard, 0.0).max(2)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return (pos >= 0) & (pos >= length[:, None, None] - protected_share(self.window, budget))

    def _centre(self, view: LayerView) -> tuple[jax.Array, jax.Array]:
        """Mean query and mean norms of its pairs, float32 [B or 1, N, H] and [B or 1, N, F]."""
        config = view.config
        if not self.file:
            if view.stats is None:
                raise ValueError(
                    "triattention takes the mean of all prompt queries, and a cache has none: give "
                    "file="
                )
            count = jnp.maximum(view.stats.count, 1.0)[:, None, None]
            return view.stats.queries / count, view.stats.norms / count
        found = _load(self.file)
        heads = (config.num_layers, config.num_heads)
        for name, width in ((MEAN, config.head_dim), (NORMS, config.ropes[0].dim // 2)):
            check_shape(self.file, COMMAND, name, found[name], (*heads, width))
        mean, norms = (jnp.asarray(found[name])[view.layer][None] for name in (MEAN, NORMS))
        return mean, norms

    def _turned(self, mean: jax.Array, view: LayerView) -> tuple[jax.Array, jax.Array]:
        """The mean query at the positions to come, averaged [B, N, H]; the table's factor [B]."""
        steps = jnp.asarray([1 << i for i in range(self.reach.bit_length())], jnp.int32)
        cos, sin = rope_tables(view.config, view.length[:, None] + steps[None], view.span)
        # RoPE is linear in its cosines and sines: their mean is the mean rotation.
        cos, sin = (table[view.rope].mean(1, keepdims=True) for table in (cos, sin))
        factors = jnp.stack([inverse_frequencies(r, view.span)[1] for r in view.config.ropes])
        mean = jnp.broadcast_to(mean, (cos.shape[0], *mean.shape[1:]))
        interleaved = view.config.rope_interleaved
        future = apply_rope(mean[:, None], cos, sin, interleaved=interleaved)[:, 0]
        return future, factors[view.rope]


def pair_norms(x: jax.Array, config: ModelConfig) -> jax.Array:
    """Norms of the pairs of dimensions that RoPE turns together: [..., H] -> [..., F]."""
    half = config.ropes[0].dim // 2
    turned = x[..., : 2 * half]
    if config.rope_interleaved:
        pairs = turned.reshape(*x.shape[:-1], half, 2)
    else:
        pairs = jnp.stack([turned[..., :half], turned[..., half:]], axis=-1)
    return jnp.sqrt((pairs * pairs).sum(-1))


def _load(file: str) -> dict:
    return load_statistics(file, COMMAND, **{MEAN: "LNH", NORMS: "LNF"})
