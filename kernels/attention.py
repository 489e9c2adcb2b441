"""Attention of a small block of rows over the keys before it and over itself.

One operation serves prompt chunks, observers, decoding (P = 1), tree verification and training.
The context holds what was read before (the start of a prompt, or a cache with a budget) and every
slot knows its position. The block's own keys follow an explicit [P, P] mask. Memory is linear in
the number of context slots: the context is swept in blocks with a running softmax.

Letters: B batch, P rows of the block, N query heads, K KV heads, G = N / K, H head dim, S slots.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.common import (
    FLOOR,
    Own,
    Places,
    Scales,
    Slots,
    default_block,
    grouped,
    key_blocks,
    own_seen,
    read_block,
    slot_bounds,
    softcap_logits,
    sweep_range,
    visible_by_position,
    with_sinks,
)
from lookahead_jax.kernels.dispatch import Implementation, choose, per_shard
from lookahead_jax.kernels.gradients import Static, attend


def slots_from(a: jax.Array, start, size: int, layer: jax.Array | None) -> jax.Array:
    """Slots [B, K, size, H] of keys or values, or of one layer of a stack of them.

    One slice for layer and slots, so that XLA does not copy the whole layer out of its stack.
    """
    if layer is None:
        return jax.lax.dynamic_slice_in_dim(a, start, size, axis=-2)
    sizes = (1, *a.shape[1:3], size, a.shape[4])
    return jax.lax.dynamic_slice(a, (layer, 0, 0, start, 0), sizes)[0]


def _accumulate(state, logits, v, scale=None):
    """Adds a set of keys to the running (maximum, mass, weighted values) of each row.

    `scale` [B, K, S] belongs to int8 values and multiplies the probabilities instead.
    """
    m, mass, out = state
    m_new = jnp.maximum(m, logits.max(-1))
    p = jnp.exp(logits - m_new[..., None])
    shrink = jnp.exp(m - m_new)
    mass = mass * shrink + p.sum(-1)
    p = p if scale is None else p * scale[:, :, None, None]
    new = jnp.einsum("bkgps,bksh->bkgph", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return m_new, mass, out * shrink[..., None] + new


def block_attention(
    q: jax.Array,  # [B, P, N, H]
    own: Own,
    q_pos: jax.Array,  # [B, P] int32, -1 = padding row
    context: tuple[jax.Array, jax.Array, jax.Array] | None,  # k, v [B,K,S,H], pos [B,K or 1,S]
    *,
    scale: float,
    softcap: float | None,
    window: jax.Array | int | None,
    slots: Slots | None = None,
    layer: jax.Array | None = None,
    sinks: jax.Array | None = None,  # [N]
    scales: tuple[jax.Array, jax.Array] | None = None,
    key_block: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of P rows over the context and the block, computed in float32.

    Returns the output [B, P, N, H] in the dtype of `q` and the log-sum-exp of each row's logits,
    float32 [B, N, P] (-inf for a row that sees nothing; its output is zeros). `slots` is the
    half-open range of slots worth reading, for all rows or for each row and KV head. With traced
    bounds XLA skips the other slots at run time, and reverse-mode differentiation is impossible.
    Slots with position -1 may hold anything, NaN included. With `layer` (int32 scalar) the
    context's keys and values are stacks [L, B, K, S, H], and that layer is read in place. `sinks`
    are logits in the softmax of each query head that have no value (common.with_sinks); they count
    in the log-sum-exp, so it is never -inf then.

    `scales` are those of int8 keys and values of the context, float32 [B, K, S]; the block's own
    are int8 then, too (`Own.scales`). They multiply logits and probabilities, so that no key or
    value is turned back into floats beyond the block of slots at hand. The GPU kernel does not
    read int8.

    `implementation` None selects the platform's own (Pallas on TPU, on CPUs LLVM's code for few
    rows, XLA elsewhere), or XLA if that one does not support the arguments. A named implementation
    runs or raises NotImplementedError.
    On several devices call it under `jax.set_mesh`: kernels then run on each device's rows and
    heads.
    """
    if (scales is None) != (own.scales is None) and context is not None:
        raise ValueError("int8 keys and values need the scales of the context and of the block")
    name = choose(implementation, q.shape[-1], lambda name: _unsupported(name, q, own, context))
    forms = {"xla": _xla, "llvm_cpu": _llvm}
    run = forms[name] if name in forms else functools.partial(_pallas, name)
    out, lse = run(
        q, own, q_pos, context,
        scale=scale, softcap=softcap, window=window, slots=slots, layer=layer, scales=scales,
        key_block=key_block,
    )  # fmt: skip
    return with_sinks(out, lse, sinks)


def _unsupported(name: Implementation, q: jax.Array, own: Own, context: Any) -> str | None:
    """Why a kernel does not support these arguments, or None."""
    if context is None:
        return "attention without a context is left to XLA"
    if name == "llvm_cpu":
        from lookahead_jax.kernels.attention_cpu import unsupported

        return unsupported(q, own, context)
    if name == "pallas_gpu":
        from lookahead_jax.kernels.gpu_blocks import unsupported

        return unsupported(q, context[0])
    from lookahead_jax.kernels.tpu_blocks import unsupported

    return unsupported(q, context[0], int8=True)


def _pallas(
    name, q, own, q_pos, context, *, scale, softcap, window, slots, layer, scales, key_block
):
    """A kernel on each device's rows and heads; same arguments and results as `_xla`."""
    if name == "pallas_gpu":
        from lookahead_jax.kernels import attention_gpu as backend
    else:
        from lookahead_jax.kernels import attention_tpu as backend
    static = Static(functools.partial(backend.attend, key_block=key_block), scale, softcap)
    ctx_k, ctx_v, ctx_pos = context
    bounds = slot_bounds(slots, q.shape[0], own.k.shape[1], ctx_k.shape[-2])
    seen = own_seen(own.visible, q_pos, window).astype(jnp.int8)
    window = None if window is None else jnp.asarray(window, jnp.int32)

    factors = (None,) * 4 if scales is None else (*own.scales, *scales)

    def local(*shards):
        q, k, v, ctx_k, ctx_v, q_pos, ctx_pos, seen, bounds, window, layer, *factors = shards
        b, p, n, h = q.shape
        by = None if factors[0] is None else Scales(*factors)
        places = Places(q_pos, ctx_pos, seen, bounds.reshape(-1), window, layer, scales=by)
        attended: Any = attend(static, grouped(q, k.shape[1]), (k, v), (ctx_k, ctx_v), places)
        out, lse = attended
        return out.transpose(0, 3, 1, 2, 4).reshape(b, p, n, h), lse.reshape(b, n, p)

    keys = "BKSH" if layer is None else "LBKSH"
    return per_shard(
        local,
        (q, own.k, own.v, ctx_k, ctx_v, q_pos, ctx_pos, seen, bounds, window, layer, *factors),
        ("BPNH", "BKPH", "BKPH", keys, keys, "BP", "BKS", "BPP", "BKE", "", "", *["BKS"] * 4),
        ("BPNH", "BNP"),
    )


def _llvm(*arguments, **settings):
    """The kernel for CPUs; same arguments and results as `_xla`, which gives its derivatives."""
    leaves, tree = jax.tree.flatten((arguments, settings))
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    fixed = tuple(None if isinstance(leaf, jax.Array) else leaf for leaf in leaves)
    return _attend_llvm(_Call(tree, fixed), arrays)


class _Call(NamedTuple):
    """Arguments without their arrays, hashable."""

    tree: Any
    leaves: tuple[Any, ...]  # None where an array belongs

    def of(self, function: Callable[..., Any], arrays: list[jax.Array]) -> Any:
        rest = iter(arrays)
        leaves = [next(rest) if leaf is None else leaf for leaf in self.leaves]
        arguments, settings = jax.tree.unflatten(self.tree, leaves)
        return function(*arguments, **settings)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_llvm(call: _Call, arrays: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    from lookahead_jax.kernels.attention_cpu import attend

    return call.of(attend, arrays)


@_attend_llvm.defjvp
def _derivative(call: _Call, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(call.of, _xla), primals, tangents)


def _xla(q, own, q_pos, context, *, scale, softcap, window, slots, layer, scales, key_block):
    """The reference: the context in blocks with a running softmax."""
    b, p, n, h = q.shape
    qg = grouped(q, own.k.shape[1])
    seen = own_seen(own.visible, q_pos, window)[:, None]

    def floats(a):
        return a.astype(q.dtype) if a.dtype == jnp.int8 else a

    def logits_of(keys, mask, by=None):
        raw = jnp.einsum("bkgph,bksh->bkgps", qg, floats(keys), preferred_element_type=jnp.float32)
        raw = raw if by is None else raw * by[:, :, None, None]
        return jnp.where(mask[:, :, None], softcap_logits(raw * scale, softcap), -jnp.inf)

    rows = qg.shape[:4]
    state = (
        jnp.full(rows, FLOOR, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, h), jnp.float32),
    )
    k_by, v_by = own.scales or (None, None)
    state = _accumulate(state, logits_of(own.k, seen, k_by), floats(own.v), v_by)

    if context is not None and context[0].shape[-2] > 0:
        ctx_k, ctx_v, ctx_pos = context
        total = ctx_k.shape[-2]
        size, count = key_blocks(total, key_block or default_block(b * n * p))

        def step(j, state):
            (pb,), new = read_block(j, size, total, ctx_pos[..., None])
            pb = jnp.where(new, pb[..., 0], -1)
            start = jnp.minimum(j * size, total - size)
            kb, vb = (slots_from(a, start, size, layer) for a in (ctx_k, ctx_v))
            mask, k_by, v_by = visible_by_position(q_pos, pb, window), None, None
            # 0 * NaN is NaN: values of dead slots must not reach the product.
            if scales is None:
                vb = jnp.where((pb >= 0)[..., None], vb, jnp.zeros((), vb.dtype))
            else:
                k_by, v_by = (jax.lax.dynamic_slice_in_dim(a, start, size, 2) for a in scales)
                v_by = jnp.where(pb >= 0, v_by, 0.0)
            return _accumulate(state, logits_of(kb, mask, k_by), floats(vb), v_by)

        if count == 1:
            state = step(0, state)
        else:
            state = jax.lax.fori_loop(*sweep_range(slots, total, size), step, state)

    m, mass, out = state
    out = out / jnp.where(mass > 0, mass, 1.0)[..., None]
    lse = jnp.where(mass > 0, m + jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, p, n, h).astype(q.dtype), lse.reshape(b, n, p)
