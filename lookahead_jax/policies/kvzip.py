"""kvzip, kvzip+: what the model attends to while it repeats the context.

Source: arXiv 2505.23416 and its public code (snu-mllab/KVzip), whose requests, chunks and maxima
these are. There the chat template's system part takes the place of the `sinks`; kvpress keeps four.
kvzip+ is in kvpress and in arXiv 2601.07891 (KVzap).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.importance import head_scores
from lookahead_jax.kernels.reductions import reduce_group
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.quantization import QuantizedWeight, Weight
from lookahead_jax.policies.base import Policy, WithReplay
from lookahead_jax.policies.selection import count_best
from lookahead_jax.policies.view import LayerView

_TINY = 1e-30  # below any norm of a residual stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Keeps what the model attends to while it reads the context once more.

    Scores are the largest attention over the group and all queries of the second reading. Behind
    the prompt's full cache the context is read again in chunks, each after a request to repeat it
    (kvzip_replay.py); a chunk's queries see sinks, the chunk and themselves. The first entries are
    always kept. `allocate="global"` keeps the best L * K * C entries of a row, whatever layers and
    heads they are in, so the cache needs a slot per prompt token; "layer" keeps the best K * C of
    each layer. Entries that have left a sliding window are not candidates.
    """

    chunk: int = 2000
    """Tokens of the context that are read again at a time."""
    sinks: int = 4
    """First entries, always kept, and seen by every chunk."""
    allocate: Literal["global", "layer"] = "global"
    """What shares the budget: all layers and heads together, or the heads of each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1 or self.sinks < 0:
            raise ValueError(
                f"chunk={self.chunk} must be at least 1 and sinks={self.sinks} not negative"
            )

    @property
    def reading(self) -> WithReplay:
        return WithReplay(
            chunk=self.chunk, sinks=self.sinks, across_layers=self.allocate == "global"
        )

    def score(self, view: LayerView) -> jax.Array:
        return view.attention_scores(reduce="max", pool=None, group="max")

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return (pos >= 0) & (pos < min(self.sinks, budget))

    def head_budgets(
        self, ranked: jax.Array, candidates: jax.Array, layer_budget: jax.Array
    ) -> jax.Array:
        total = jnp.minimum(candidates.shape[1] * layer_budget, candidates.sum(1))
        return jnp.minimum(count_best(ranked, total), candidates)

    def max_entries(self, tokens: int, budget: int, config: ModelConfig) -> int:
        return tokens if self.allocate == "global" else min(tokens, config.num_kv_heads * budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzipPlus(KVzip):
    """As kvzip, by what an entry adds to the residual stream of the token that attends to it.

    Each query's attention is divided by the L2 norm of the layer's input at that token, and
    multiplied, per query head, by the L2 norm of W_o v; the largest value over the group and all
    queries is the score. kvpress divides by the norm of the layer's input after its norm, which is
    nearly the same for all tokens; here it is the residual stream itself.
    """

    def score(self, view: LayerView) -> jax.Array:
        queries = view.queries
        if queries is None or queries.residual is None or view.o is None:
            raise ValueError("kvzip+ scores with a replay of the prompt and was given none")
        attention = head_scores(
            queries.q, queries.pos, view.k, view.pos, queries.own, scale=view.config.attn_scale,
            softcap=view.config.attn_softcap, window=view.window, reduce="max",
            sinks=view.sink_logits, factors=1.0 / jnp.maximum(queries.residual, _TINY),
        )  # fmt: skip
        weighed = attention * output_norms(view.v, view.o)
        return jnp.where(view.pos >= 0, reduce_group(weighed, view.k.shape[1], "max"), 0.0)


def output_norms(v: jax.Array, o: Weight) -> jax.Array:
    """L2 norms of the values [B, K, T, H] after `o` [N, H, D]: float32 [B, N, T]."""
    scale = None
    if isinstance(o, QuantizedWeight):
        o, scale = o.values, o.scale
    matrix = o.astype(jnp.float32)
    matrix = matrix if scale is None else matrix * scale[None, None]
    # |v W|^2 = v (W W') v', with H x H numbers instead of H x D.
    square = jnp.einsum("nhd,nid->nhi", matrix, matrix, preferred_element_type=jnp.float32)
    batch, heads, tokens, width = v.shape
    square = square.reshape(heads, -1, width, width)
    v = v.astype(jnp.float32)
    turned = jnp.einsum("bksh,kghi->bkgsi", v, square)
    squares = jnp.einsum("bkgsi,bksi->bkgs", turned, v)
    return jnp.sqrt(jnp.maximum(squares, 0.0)).reshape(batch, -1, tokens)
