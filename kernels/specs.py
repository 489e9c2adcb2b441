"""Shapes at which the kernels are compiled ahead of time and measured: Llama 3.1 8B and smaller.

Letters: B batch, M observing rows, P rows of a block, N query heads, K KV heads, H head dim,
T prompt entries, S cache slots.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.common import Own
from lookahead_jax.kernels.dispatch import Implementation
from lookahead_jax.kernels.importance import head_scores, importance_scores
from lookahead_jax.kernels.reductions import Finish

MEAN = Finish(None, "mean")  # lookaheadkv
SNAPKV = Finish(("max", 7), "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One call of an operation; `call` makes it."""

    name: str
    op: Literal["scores", "attention"]
    rows: int  # M or P
    keys: int  # T or S
    batch: int = 1
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    known: bool = True  # scores: the log-sum-exp is given
    finish: Finish | None = None  # scores: of KV heads, for policies; None: of query heads

    def shapes(self, dtype: Any = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments by name; positions are per head for a cache, shared for a prompt."""
        b, n, k, h = self.batch, self.query_heads, self.kv_heads, self.head_dim
        shape = jax.ShapeDtypeStruct
        own = shape((b, k, self.rows, h), dtype)
        keys = shape((b, k, self.keys, h), dtype)
        pos = (b, 1 if self.op == "scores" else k, self.keys)
        arguments = {
            "q": shape((b, self.rows, n, h), dtype),
            "q_pos": shape((b, self.rows), jnp.int32),
            "own_k": own,
            "visible": shape((b, self.rows, self.rows), jnp.bool_),
            "k": keys,
            "pos": shape(pos, jnp.int32),
        }
        if self.op == "attention":
            return {**arguments, "own_v": own, "v": keys, "length": shape((b, k), jnp.int32)}
        if self.known:
            arguments["lse"] = shape((b, n, self.rows), jnp.float32)
        return arguments

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
    def output_bytes(self) -> int:
        """Size of the result."""
        if self.op == "attention":
            return 2 * self.batch * self.rows * self.query_heads * self.head_dim
        heads = self.query_heads if self.finish is None else self.kv_heads
        return 4 * self.batch * heads * self.keys

    @property
    def pairs(self) -> int:
        """Logits of one sweep."""
        return self.batch * self.query_heads * self.rows * self.keys


def call(spec: Spec, a: dict[str, jax.Array], implementation: Implementation, scale: float) -> Any:
    """The public operation on a spec's arguments: scores, or outputs and log-sum-exp."""
    common: Any = dict(scale=scale, softcap=None, window=None, implementation=implementation)
    own = a["own_k"], a["visible"]
    if spec.op == "attention":
        return block_attention(
            a["q"], Own(a["own_k"], a["own_v"], a["visible"]), a["q_pos"],
            (a["k"], a["v"], a["pos"]), slots=(0, a["length"]), **common,
        )  # fmt: skip
    common |= dict(lse=a.get("lse"), reduce="mean")
    if spec.finish is None:
        return head_scores(a["q"], a["q_pos"], a["k"], a["pos"], own, **common)
    return importance_scores(
        a["q"], a["q_pos"], a["k"], a["pos"], own, valid=a["pos"] >= 0,
        pool=spec.finish.pool, group=spec.finish.group, **common,
    )  # fmt: skip


def scores(name: str, rows: int, keys: int, **kw: Any) -> Spec:
    """A scoring call; default sizes are those of Llama 3.1 8B."""
    return Spec(name=name, op="scores", rows=rows, keys=keys, **kw)


def attention(name: str, rows: int, keys: int, **kw: Any) -> Spec:
    """An attention call; default sizes are those of Llama 3.1 8B."""
    return Spec(name=name, op="attention", rows=rows, keys=keys, **kw)


SPECS = {
    spec.name: spec
    for spec in (
        scores("scores_8k", 32, 8192, finish=MEAN),
        scores("scores_32k", 32, 32768, finish=MEAN),
        scores("scores_128k", 32, 131072, finish=MEAN),
        scores("scores_window_32k", 64, 32768, known=False, finish=SNAPKV),
        scores("scores_window_128k", 64, 131072, known=False, finish=SNAPKV),
        scores("scores_response_16k", 512, 16384),
        scores("scores_32k_dim64", 32, 32768, finish=MEAN, head_dim=64),
        attention("decode_1k", 1, 1024),
        attention("decode_2k_batch8", 1, 2048, batch=8),
        attention("decode_32k", 1, 32768),
        attention("decode_128k", 1, 131072),
        attention("decode_32k_dim64", 1, 32768, head_dim=64),
        attention("tree_64_1k", 64, 1024),
        attention("tree_64_32k", 64, 32768),
        attention("observe_32k", 32, 32768),
        attention("observe_128k", 32, 131072),
    )
}
