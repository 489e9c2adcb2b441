"""qfilter: keys along the main direction of the queries (Q-Filters, arXiv 2503.02812)."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lookahead_jax.kernels.reductions import reduce_group
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import CutByEntries, DecodeCut, Policy
from lookahead_jax.policies.view import Chunk, LayerView

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
            load_filters(self.file)

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
        filters = load_filters(self.file)
        expected = (config.num_layers, config.num_kv_heads, config.head_dim)
        if filters.shape != expected:
            raise ValueError(
                f"{self.file}: filters [L, K, H] of {filters.shape} are for another model; "
                f"this one has {expected}: compute them with `lookahead train qfilters`"
            )
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


@functools.cache
def load_filters(file: str) -> np.ndarray:
    """The filters in a safetensors file, float32 [L, K, H].

    Raises FileNotFoundError without the file, ValueError if it holds no filters.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: write it with lookahead train qfilters")
    try:
        tensors = safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    filters = tensors.get(TENSOR)
    if filters is None or filters.ndim != 3 or not jnp.issubdtype(filters.dtype, jnp.floating):
        raise ValueError(f"{file} has no tensor {TENSOR} [L, K, H], so it holds no filters")
    filters = filters.astype(np.float32)
    if not np.isfinite(filters).all():
        raise ValueError(f"{file}: {TENSOR} holds values that are NaN or infinite")
    return filters
