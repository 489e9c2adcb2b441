"""Causal self-attention of a text read from its start, in memory linear in its length.

Existing kernels are used: splash attention on TPU, cuDNN's flash attention on NVIDIA GPUs. The XLA
form runs everywhere, is the reference, and is the fastest one on CPU.

Letters: B batch, T tokens, N query heads, K KV heads, G = N / K, H head dim.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.common import KEY_BLOCK, Own, with_sinks
from lookahead_jax.kernels.dispatch import log_once, per_shard, placed

Implementation = Literal["xla", "splash", "cudnn"]
_SPLASH_BLOCK = 512


def causal_attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, K, T, H]
    v: jax.Array,  # [B, K, T, H]
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: jax.Array | None = None,  # [N]
    implementation: Implementation | None = None,
) -> jax.Array:
    """Row i sees rows max(0, i - window + 1) .. i; returns [B, T, N, H] in the dtype of `q`.

    Right-padded batches need no mask, because no token sees the padding after it. A named
    implementation runs or raises NotImplementedError with the reason. `sinks` are those of
    `attention.block_attention`. None selects the platform's
    own, or XLA if that one does not support the arguments. On several TPU devices call it under
    `jax.set_mesh`: batch and heads are then split over the axes "data" (with "fsdp") and "tensor".
    """
    forms = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}
    settings: Any = dict(scale=scale, softcap=softcap, window=window)
    if implementation is not None:
        if (reason := _unsupported(implementation, q, softcap, sinks)) is not None:
            raise NotImplementedError(f"{implementation} attention: {reason}")
        return forms[implementation](q, k, v, sinks, **settings)

    def supported(name: Implementation):
        reason = _unsupported(name, q, softcap, sinks)
        if name == "splash" and not placed():
            reason = "there are several devices and no mesh in use"
        if reason is not None:
            log_once(f"{name} attention is not used: {reason}")
        return functools.partial(forms["xla" if reason else name], **settings)

    fallback = functools.partial(_xla, **settings)
    return jax.lax.platform_dependent(
        q, k, v, sinks, tpu=supported("splash"), cuda=supported("cudnn"), default=fallback
    )


def _unsupported(
    name: Implementation, q: jax.Array, softcap: float | None, sinks: jax.Array | None
) -> str | None:
    """Why an implementation does not support these arguments, or None."""
    _, tokens, _, head_dim = q.shape
    if name == "splash":
        if tokens % 128:
            return f"{tokens} tokens are not a multiple of 128"
        if head_dim % 64:
            return f"head dim {head_dim} is not a multiple of 64"
    if name == "cudnn":
        if jax.default_backend() != "gpu":
            return "there is no CUDA device"  # JAX asks cuDNN for its version while tracing
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it takes 16-bit floats, not {q.dtype}"
        if softcap is not None:
            return "it has no soft-cap"
        if sinks is not None:
            return "it has no attention sinks"
        if head_dim > 256 or head_dim % 8:
            return f"head dim {head_dim}"
    return None


def _xla(q, k, v, sinks, *, scale, softcap, window):
    """Chunks of queries, each over its own diagonal block and the preceding blocks."""
    batch, tokens, n, h = q.shape
    size = min(KEY_BLOCK, tokens)
    pad = -tokens % size
    q = jnp.pad(q, [(0, 0), (0, pad), (0, 0), (0, 0)])
    k, v = (jnp.pad(a, [(0, 0), (0, 0), (0, pad), (0, 0)]) for a in (k, v))
    slots = jnp.arange(tokens + pad, dtype=jnp.int32)[None]
    row = jnp.arange(size, dtype=jnp.int32)
    visible = jnp.broadcast_to((row[None] <= row[:, None])[None], (batch, size, size))

    def chunk(c):
        start = c * size

        def part(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, start, size, axis)

        pos = jnp.broadcast_to(part(slots, 1), (batch, size))
        context = None
        if tokens > size:
            before = jnp.where(slots < start, slots, -1)
            context = (k, v, jnp.broadcast_to(before, (batch, tokens + pad))[:, None])
        first = 0 if window is None else jnp.maximum(start - window + 1, 0)
        out, _ = block_attention(
            part(q, 1), Own(part(k, 2), part(v, 2), visible), pos, context,
            scale=scale, softcap=softcap, window=window, slots=(first, start), sinks=sinks,
            implementation="xla",
        )  # fmt: skip
        return out

    if tokens <= size:
        return chunk(0)
    out = jax.lax.map(chunk, jnp.arange((tokens + pad) // size, dtype=jnp.int32))
    return out.swapaxes(0, 1).reshape(batch, tokens + pad, n, h)[:, :tokens]


def _splash(q, k, v, sinks, *, scale, softcap, window):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, groups = q.shape[1], q.shape[2] // k.shape[1]
    shape = (tokens, tokens)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(b for b in (_SPLASH_BLOCK, 256, 128) if tokens % b == 0)
    attend = kernel.make_splash_mqa_single_device(
        mask=masks.MultiHeadMask([mask] * groups),
        block_sizes=kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        attn_logits_soft_cap=softcap,
        save_residuals=sinks is not None,
    )

    def local(q, k, v, sinks):
        b, t, n, h = q.shape
        q = (q * jnp.asarray(scale, q.dtype)).reshape(b, t, k.shape[1], groups, h)
        attended: Any = jax.vmap(jax.vmap(attend))(q.transpose(0, 2, 3, 1, 4), k, v)
        out, (lse,) = (attended, (None,)) if sinks is None else attended
        out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
        return out if lse is None else with_sinks(out, lse.reshape(b, n, t), sinks)[0]

    return per_shard(local, (q, k, v, sinks), ("BTNH", "BKTH", "BKTH", "N"), ("BTNH",))


def _cudnn(q, k, v, _, *, scale, softcap, window):
    return jax.nn.dot_product_attention(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
