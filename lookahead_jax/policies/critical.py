"""critical: half of the budget by what the values contribute to the output (arXiv 2502.03805)."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.common import read_block
from lookahead_jax.model.quantization import QuantizedWeight, Weight
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.blockwise import Blockwise
from lookahead_jax.policies.expected_attention import ExpectedAttention
from lookahead_jax.policies.keydiff import KeyDiff
from lookahead_jax.policies.knorm import KNorm
from lookahead_jax.policies.kvzap import KVzap
from lookahead_jax.policies.kvzip import KVzipPlus
from lookahead_jax.policies.qfilter import QFilter
from lookahead_jax.policies.rkv import RKV
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.triattention import TriAttention
from lookahead_jax.policies.view import LayerView
from lookahead_jax.policies.wrapper import PolicyWrapper

_EPSILON = 1e-4
_LARGEST = float(jnp.finfo(jnp.float32).max)
_PROJECTED = 1 << 26  # numbers of projected values that exist at once, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critical(PolicyWrapper):
    """Spends half of the budget by another policy's scores, half by score times value norm.

    Each head first keeps its best entries by the other policy's scores alone, protected ones
    included, as many as `first_stage_ratio` of its budget (rounded down). The others compete with
    (score + 1e-4) times the L1 norm of W_o v, averaged over the query heads of the group, where W_o
    is the part of the output projection that belongs to the head. Shares of heads come from the
    other policy's scores, so `critical:ada` and `ada:critical` are the same.
    """

    inner: Policy = dataclasses.field(default_factory=SnapKV)
    """The policy that scores, protects and shares the budget."""
    first_stage_ratio: float = 0.5
    """Part of a head's budget for the best scores alone. Used in steps of 1/1000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first_stage_ratio <= 1:
            raise ValueError(f"first_stage_ratio={self.first_stage_ratio} must lie between 0 and 1")

    def why_not(self, policy: Policy) -> str | None:
        if isinstance(policy, Critical | KVzipPlus):
            return "it weighs values itself"
        if isinstance(policy, Blockwise):
            return "it leaves no more entries than the budget to choose from"
        if isinstance(policy, KeyDiff | KNorm | KVzap | QFilter | RKV | TriAttention):
            return "its scores are negative, so a large value would lower them"
        if isinstance(policy, ExpectedAttention) and policy.values == "norm":
            return "it weighs values itself; set values=none"
        return super().why_not(policy)

    def rerank(self, ranked: jax.Array, budgets: jax.Array, view: LayerView) -> jax.Array:
        if view.o is None:
            raise ValueError("critical weighs values by the output projection and was given none")
        ranked = self.inner.rerank(ranked, budgets, view)
        ratio = Fraction(round(self.first_stage_ratio * 1000), 1000)
        first = budgets * ratio.numerator // ratio.denominator
        place = jnp.argsort(jnp.argsort(-ranked, axis=-1, stable=True), axis=-1)
        weighed = (ranked + _EPSILON) * projected_norms(view.v, view.o)
        weighed = jnp.clip(weighed, -_LARGEST, _LARGEST)
        competing = jnp.isfinite(ranked) & (ranked < _LARGEST)
        return jnp.where(competing, jnp.where(place < first[..., None], _LARGEST, weighed), ranked)


def projected_norms(v: jax.Array, o: Weight) -> jax.Array:
    """L1 norms of the values [B, K, T, H] after `o` [N, H, D], mean of a group: [B, K, T] float32.

    A block of entries at a time, because the projected values are N D / (K H) times as large.
    """
    batch, heads, tokens, width = v.shape
    queries, _, outputs = o.shape
    matrix, scale = (o.values, o.scale) if isinstance(o, QuantizedWeight) else (o, None)
    matrix = matrix.astype(o.dtype).reshape(heads, -1, width, outputs)
    size = min(tokens, max(8, _PROJECTED // (batch * queries * outputs)))

    def step(j, norms):
        (block,), _ = read_block(j, size, tokens, v)
        out = jnp.einsum(
            "bksh,kghd->bkgsd", block.astype(o.dtype), matrix,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        out = jnp.abs(out)
        if scale is not None:
            out = out * scale[None, None, None, None]
        start = jnp.minimum(j * size, tokens - size)
        return jax.lax.dynamic_update_slice_in_dim(norms, out.sum(-1).mean(2), start, axis=2)

    empty = jnp.zeros((batch, heads, tokens), jnp.float32)
    return jax.lax.fori_loop(0, -(-tokens // size), step, empty)
