"""Attention of a small block of rows over the keys that stand before it and over itself.

One operation serves prompt chunks, observers, decoding (P = 1), tree verification and training:
the context is whatever was read before (a prompt prefix or a budgeted cache, where every slot
knows its position), the block's own keys follow an explicit [P, P] visibility. Memory is linear
in the number of context slots: the context is swept in blocks with a running softmax.

Letters: B batch, P rows of the block, N query heads, K KV heads, G = N / K, H head dim, S slots.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.dispatch import Implementation, choose, per_shard, target_platform

# Floor of the running row maximum. Masked logits are -inf, so a row that sees nothing keeps
# this finite maximum, collects no mass, and comes out as zeros instead of NaN.
_FLOOR = -1e30
KEY_BLOCK = 512
_LOGIT_BYTES = 1 << 28
Slots = tuple[jax.Array | int, jax.Array | int]  # half-open range; arrays are scalars or [B, K]


def softcap_logits(logits: jax.Array, softcap: float | None) -> jax.Array:
    """cap * tanh(logits / cap), the bounded logits of Gemma 2; unchanged where cap is None."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def visible_by_position(
    q_pos: jax.Array,  # [B, P] int32, -1 = no query
    k_pos: jax.Array,  # [..., S] int32 broadcastable against B, -1 = empty slot
    window: jax.Array | int | None,
) -> jax.Array:
    """Who may look at whom, from stored positions alone: bool [B, heads or 1, P, S].

    A key is visible when its slot is filled, it does not lie in the query's future, and it is
    nearer than `window` positions (None: no window). `k_pos` is [B, K or 1, S].
    """
    q = q_pos[:, None, :, None]
    k = k_pos[:, :, None, :]
    seen = (k >= 0) & (k <= q)
    return seen if window is None else seen & (q - k < window)


def grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, P, N, H] -> [B, K, G, P, H]: query heads gathered under the KV head they read."""
    b, p, n, h = q.shape
    return q.reshape(b, p, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def default_block(rows: int) -> int:
    """Slots whose logits exist at once for `rows` stacked rows (batch, heads, rows of a block).

    On GPUs every turn of a loop costs launches, and with traced bounds a wait for the host: as
    many slots as 256 MiB of float32 logits allow, so that decoding has no loop. Elsewhere few.
    """
    if target_platform() not in ("gpu", "cuda"):
        return KEY_BLOCK
    return max(KEY_BLOCK, _LOGIT_BYTES // (4 * rows) // KEY_BLOCK * KEY_BLOCK)


def key_blocks(slots: int, key_block: int) -> tuple[int, int]:
    """Size and number of the blocks that cover `slots` slots."""
    size = min(slots, key_block)
    return size, -(-slots // size)


def read_block(j, size: int, slots: int, *arrays: jax.Array):
    """Block `j` of arrays whose second-to-last axis is slots, and which of its slots are new.

    The last block is moved back inside the array when `size` does not divide `slots`; slots
    that the block before it has covered are reported as not new, so that nothing counts twice.
    """
    start = jnp.minimum(j * size, slots - size)
    blocks = tuple(jax.lax.dynamic_slice_in_dim(a, start, size, axis=-2) for a in arrays)
    return blocks, start + jnp.arange(size) >= j * size


def slots_from(a: jax.Array, start, size: int, layer: jax.Array | None) -> jax.Array:
    """Slots [B, K, size, H] of keys or values, of one layer where they are a stack of layers.

    Both at once, so that XLA never copies a whole layer out of its stack.
    """
    if layer is None:
        return jax.lax.dynamic_slice_in_dim(a, start, size, axis=-2)
    sizes = (1, *a.shape[1:3], size, a.shape[4])
    return jax.lax.dynamic_slice(a, (layer, 0, 0, start, 0), sizes)[0]


def _accumulate(state, logits, v):
    """One more set of keys into the running (maximum, mass, weighted values) of each row."""
    m, mass, out = state
    m_new = jnp.maximum(m, logits.max(-1))
    p = jnp.exp(logits - m_new[..., None])
    shrink = jnp.exp(m - m_new)
    mass = mass * shrink + p.sum(-1)
    new = jnp.einsum("bkgps,bksh->bkgph", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return m_new, mass, out * shrink[..., None] + new


def block_attention(
    q: jax.Array,  # [B, P, N, H]
    k: jax.Array,  # [B, K, P, H] the block's own keys
    v: jax.Array,  # [B, K, P, H]
    own_visible: jax.Array,  # [B, P, P] bool, row i sees column j of the block
    q_pos: jax.Array,  # [B, P] int32, -1 = padding row
    context: tuple[jax.Array, jax.Array, jax.Array] | None,  # k, v [B,K,S,H], pos [B,K or 1,S]
    *,
    scale: float,
    softcap: float | None,
    window: jax.Array | int | None,
    slots: Slots | None = None,
    layer: jax.Array | None = None,
    key_block: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of P rows over the context and the block, computed in float32.

    Returns the output [B, P, N, H] in the dtype of `q` and the log-sum-exp of each row's logits,
    float32 [B, N, P] (-inf for a row that sees nothing; its output is zeros). `slots` bounds the
    slots worth reading, as a half-open range, for all rows or for each row and KV head; with
    traced bounds XLA's sweep skips the rest at run time, and is then not reverse-differentiable.
    Slots with position -1 may hold anything, NaN included. With `layer` (int32 scalar) the
    context's keys and values are stacks [L, B, K, S, H], of which that one is read in place.

    `implementation` None takes the platform's own (Pallas on TPU, XLA elsewhere), or XLA where
    that cannot; a named one runs or raises NotImplementedError. On several devices call it under
    `jax.set_mesh`: kernels then run on each device's rows and heads.
    """
    name = choose(implementation, q.shape[-1], lambda name: _unsupported(name, q, context))
    run = _xla if name == "xla" or context is None else functools.partial(_pallas, name)
    return run(
        q, k, v, own_visible, q_pos, context,
        scale=scale, softcap=softcap, window=window, slots=slots, layer=layer, key_block=key_block,
    )  # fmt: skip


def _unsupported(name: Implementation, q: jax.Array, context: Any) -> str | None:
    """Why a kernel cannot take these arguments, or None."""
    if context is None:
        return "attention without a context is left to XLA"
    if name == "pallas_gpu":
        from lookahead_jax.kernels.attention_gpu import unsupported
    else:
        from lookahead_jax.kernels.importance_tpu import unsupported
    return unsupported(q, context[0])


def own_seen(own_visible: jax.Array, q_pos: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """The block's own visibility with the sliding window: bool [B, P, P]."""
    if window is None:
        return own_visible
    return own_visible & (q_pos[:, :, None] - q_pos[:, None, :] < window)


def slot_bounds(slots: Slots | None, batch: int, heads: int, total: int) -> jax.Array:
    """The range of slots worth reading, for each row and KV head: int32 [B, K, 2]."""
    first, last = slots if slots is not None else (0, total)
    ends = [jnp.broadcast_to(jnp.asarray(a, jnp.int32), (batch, heads)) for a in (first, last)]
    return jnp.stack(ends, axis=-1)


def sweep_range(slots: Slots | None, total: int, size: int):
    """The blocks of `size` slots that hold the range of any row and head."""
    first, last = slots if slots is not None else (0, total)
    first = first.min() if isinstance(first, jax.Array) else first
    last = last.max() if isinstance(last, jax.Array) else last
    return first // size, -(-last // size)


def _pallas(
    name, q, k, v, own_visible, q_pos, context, *, scale, softcap, window, slots, layer, key_block
):
    """A kernel on each device's rows and heads; same arguments and results as `_xla`."""
    from lookahead_jax.kernels.gradients import Places, Static, attend

    if name == "pallas_gpu":
        from lookahead_jax.kernels import attention_gpu as backend
    else:
        from lookahead_jax.kernels import attention_tpu as backend
    static = Static(functools.partial(backend.attend, key_block=key_block), scale, softcap)
    ctx_k, ctx_v, ctx_pos = context
    bounds = slot_bounds(slots, q.shape[0], k.shape[1], ctx_k.shape[-2])
    seen = own_seen(own_visible, q_pos, window).astype(jnp.int8)
    window = None if window is None else jnp.asarray(window, jnp.int32)

    def local(q, k, v, ctx_k, ctx_v, q_pos, ctx_pos, seen, bounds, window, layer):
        b, p, n, h = q.shape
        places = Places(q_pos, ctx_pos, seen, bounds.reshape(-1), window, layer)
        found: Any = attend(static, grouped(q, k.shape[1]), k, v, ctx_k, ctx_v, places)
        out, lse = found
        return out.transpose(0, 3, 1, 2, 4).reshape(b, p, n, h), lse.reshape(b, n, p)

    keys = "BKSH" if layer is None else "LBKSH"
    return per_shard(
        local,
        (q, k, v, ctx_k, ctx_v, q_pos, ctx_pos, seen, bounds, window, layer),
        ("BPNH", "BKPH", "BKPH", keys, keys, "BP", "BKS", "BPP", "BKE", "", ""),
        ("BPNH", "BNP"),
    )


def _xla(q, k, v, own_visible, q_pos, context, *, scale, softcap, window, slots, layer, key_block):
    """The formula: the context in blocks with a running softmax. It defines the semantics."""
    b, p, n, h = q.shape
    kv_heads = k.shape[1]
    qg = grouped(q, kv_heads)
    own = own_seen(own_visible, q_pos, window)[:, None]

    def logits_of(keys, mask):
        raw = jnp.einsum("bkgph,bksh->bkgps", qg, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask[:, :, None], softcap_logits(raw * scale, softcap), -jnp.inf)

    rows = qg.shape[:4]
    state = (
        jnp.full(rows, _FLOOR, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, h), jnp.float32),
    )
    state = _accumulate(state, logits_of(k, own), v)

    if context is not None and context[0].shape[-2] > 0:
        ctx_k, ctx_v, ctx_pos = context
        total = ctx_k.shape[-2]
        size, count = key_blocks(total, key_block or default_block(b * n * p))

        def step(j, state):
            (pb,), new = read_block(j, size, total, ctx_pos[..., None])
            pb = jnp.where(new, pb[..., 0], -1)
            start = jnp.minimum(j * size, total - size)
            kb, vb = (slots_from(a, start, size, layer) for a in (ctx_k, ctx_v))
            # 0 * NaN is NaN: values of dead slots must not reach the product.
            vb = jnp.where((pb >= 0)[..., None], vb, jnp.zeros((), vb.dtype))
            return _accumulate(state, logits_of(kb, visible_by_position(q_pos, pb, window)), vb)

        if count == 1:
            state = step(0, state)
        else:
            state = jax.lax.fori_loop(*sweep_range(slots, total, size), step, state)

    m, mass, out = state
    out = out / jnp.where(mass > 0, mass, 1.0)[..., None]
    lse = jnp.where(mass > 0, m + jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, p, n, h).astype(q.dtype), lse.reshape(b, n, p)
