"""Shapes at which the kernels are tested ahead of time and measured: Llama 3.1 8B and smaller.

Letters: B batch, M observing rows, P rows of a block, N query heads, K KV heads, H head dim,
T prompt entries, S cache slots.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One call: of `importance.head_scores`, or of `attention.block_attention`."""

    name: str
    op: Literal["scores", "attention"]
    rows: int  # M or P
    keys: int  # T or S
    batch: int = 1
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    known: bool = True  # scores: the log-sum-exp is given

    def shapes(self, dtype: Any = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments by name; positions are per head for a cache, shared for a prompt."""
        b, n, k, h = self.batch, self.query_heads, self.kv_heads, self.head_dim
        shape = jax.ShapeDtypeStruct
        own = shape((b, k, self.rows, h), dtype)
        keys = shape((b, k, self.keys, h), dtype)
        pos = (b, 1 if self.op == "scores" else k, self.keys)
        found = {
            "q": shape((b, self.rows, n, h), dtype),
            "q_pos": shape((b, self.rows), jnp.int32),
            "own_k": own,
            "visible": shape((b, self.rows, self.rows), jnp.bool_),
            "k": keys,
            "pos": shape(pos, jnp.int32),
        }
        if self.op == "attention":
            return {**found, "own_v": own, "v": keys, "length": shape((b, k), jnp.int32)}
        if self.known:
            found["lse"] = shape((b, n, self.rows), jnp.float32)
        return found

    @property
    def key_bytes(self) -> int:
        """Keys (and values) in bfloat16, read once per sweep."""
        arrays = (2 if self.op == "attention" else 1) * (1 if self.known else 2)
        return 2 * arrays * self.batch * self.kv_heads * self.keys * self.head_dim

    @property
    def flops(self) -> int:
        """Two products per row, query head and key (attention; scores in two sweeps), or one."""
        products = 2 if self.op == "attention" or not self.known else 1
        return 2 * products * self.pairs * self.head_dim

    @property
    def pairs(self) -> int:
        """Logits of one sweep."""
        return self.batch * self.query_heads * self.rows * self.keys


def scores(name: str, rows: int, keys: int, **kw: Any) -> Spec:
    """A scoring call of Llama 3.1 8B unless told otherwise."""
    return Spec(name=name, op="scores", rows=rows, keys=keys, **kw)


def attention(name: str, rows: int, keys: int, **kw: Any) -> Spec:
    """An attention call of Llama 3.1 8B unless told otherwise."""
    return Spec(name=name, op="attention", rows=rows, keys=keys, **kw)


SPECS = {
    spec.name: spec
    for spec in (
        scores("scores_8k", 32, 8192),
        scores("scores_32k", 32, 32768),
        scores("scores_128k", 32, 131072),
        scores("scores_window_32k", 64, 32768, known=False),
        scores("scores_window_128k", 64, 131072, known=False),
        scores("scores_response_16k", 512, 16384),
        attention("decode_1k", 1, 1024),
        attention("decode_2k_batch8", 1, 2048, batch=8),
        attention("decode_32k", 1, 32768),
        attention("decode_128k", 1, 131072),
        attention("tree_64_1k", 64, 1024),
        attention("tree_64_32k", 64, 32768),
        attention("observe_32k", 32, 32768),
        attention("observe_128k", 32, 131072),
    )
}
