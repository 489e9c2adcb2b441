"""qfilter: keys along the main direction of the queries (Q-Filters, arXiv 2503.02812)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.kernels.reductions import reduce_group
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import CutByEntries, DecodeCut, Policy
from lookahead_jax.policies.statistics_file import check_shape, load_statistics
from lookahead_jax.policies.view import Chunk, LayerView

COMMAND = "`lookahead train qfilters`"
TENSOR = "q_filters"  # [L, K, H], the name in the published files


class QuerySums(NamedTuple):
    """Sums over rotated queries."""

    outer: jax.Array  # [B, N, H, H] float32 of the outer products
    plain: jax.Array  # [B, N, H] float32 of the queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFilter(Policy):
    """Keeps the keys that lie furthest along the main direction of the queries.

    A filter is minus the first right singular vector of a query head's rotated queries, signed
    so that their mean lies along the vector, averaged over the group; a score is minus the product
    of filter and key. `lookahead train qfilters` computes filters from text, and published ones
    have the same form. Without `file` the prompt's own queries take the place of the text: one pass
    still, and then no eviction while decoding. Differences from the public code: all queries count,
    not a sample, and the sign is that of their mean instead of their majority.
    """

    file: str = ""
    """Safetensors file with the filters; default: the queries of the prompt give them. It is read
    once in a process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file:
            _load(self.file)

    @property
    def decode_cut(self) -> DecodeCut | None:
        return CutByEntries() if self.file else None

    def init_stats(self, batch: int, tokens: int, config: ModelConfig) -> QuerySums | None:
        return None if self.file else empty_sums(batch, config)

    def accumulate(self, stats: QuerySums | None, chunk: Chunk) -> QuerySums | None:
        return None if stats is None else add_queries(stats, chunk)

    def score(self, view: LayerView) -> jax.Array:
        if self.file:
            filters = self._filters(view.config)[view.layer][None]
        elif view.stats is None:
            raise ValueError(
                "qfilter takes filters from all prompt queries, and a cache has none: give file="
            )
        else:
            filters = reduce_group(filters_of(view.stats), view.config.num_kv_heads, "mean")
        return -jnp.einsum("bksh,bkh->bks", view.k.astype(jnp.float32), filters)

    def _filters(self, config: ModelConfig) -> jax.Array:
        filters = _load(self.file)
        expected = (config.num_layers, config.num_kv_heads, config.head_dim)
        check_shape(self.file, COMMAND, TENSOR, filters, expected)
        return jnp.asarray(filters)


def empty_sums(batch: int, config: ModelConfig) -> QuerySums:
    """Sums over no queries."""
    n, h = config.num_heads, config.head_dim
    return QuerySums(
        jnp.zeros((batch, n, h, h), jnp.float32), jnp.zeros((batch, n, h), jnp.float32)
    )


def add_queries(sums: QuerySums, chunk: Chunk) -> QuerySums:
    """Adds the queries of a chunk; padding counts nothing."""
    there = (chunk.q_pos >= 0)[:, :, None, None]
    q = jnp.where(there, chunk.q.astype(jnp.float32), 0.0)
    return QuerySums(sums.outer + jnp.einsum("bpnh,bpni->bnhi", q, q), sums.plain + q.sum(1))


def filters_of(sums: QuerySums) -> jax.Array:
    """The filter of every query head, float32 [B, N, H]: unit vectors against the mean query."""
    main = jnp.linalg.eigh(sums.outer)[1][..., -1]
    along = jnp.einsum("bnh,bnh->bn", main, sums.plain)
    return jnp.where((along > 0)[..., None], -main, main)


def _load(file: str) -> np.ndarray:
    return load_statistics(file, COMMAND, **{TENSOR: "LKH"})[TENSOR]
