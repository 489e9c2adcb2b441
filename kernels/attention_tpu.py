"""Attention of a few rows over a cache on TPU: decoding (P = 1) and tree verification.

Flash decoding: a grid step holds one block of the cache's slots for one KV head, and the stacked
rows of all query heads that read it (the matrix unit gets G * P rows). Blocks past a head's filled
slots are neither copied nor computed. The rows' own keys have a mask of their own.

Letters: B batch, P rows of the block, N query heads, K KV heads, G = N / K, H head dim, S slots,
R = G * P stacked rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lookahead_jax.kernels.common import FLOOR, LANES, LOG2E, Places, Scales
from lookahead_jax.kernels.tpu_blocks import (
    as_stored,
    block_size,
    live,
    masked_logits,
    pad_axis,
    read_at,
    slots_spec,
)

_ROWS = 512  # stacked rows of a tile
_PART = 512  # slots of one product
_LOGITS = 1 << 20  # logits of a grid step, in vector memory


def _across(a, width):
    """[R, 128] with equal lanes -> [R, width]."""
    return jnp.concatenate([a] * -(-width // LANES), axis=1)[:, :width]


def _kernel(*refs, scale, softcap, windowed, size):
    """One block of slots for all rows of a head: a running softmax that begins with their own keys.

    Its parts stand inside because they read and write the same references.
    """
    bounds_ref, numbers_ref, q_ref, q_pos_ref, own_k_ref, own_v_ref, own_seen_ref = refs[:7]
    k_ref, v_ref, k_pos_ref, *by_refs, out_ref, lse_ref = refs[7:-4]
    m_ref, mass_ref, acc_ref, logits_ref = refs[-4:]
    own_k_by, own_v_by, k_by, v_by = by_refs or (None,) * 4
    block = pl.program_id(3)
    window = numbers_ref[0] if windowed else None

    def slots_of(ref, part):
        return ref[part] if ref.shape[0] == size else ref[:, part]

    def of_part(ref, part):
        return None if ref is None else ref[:, part]

    def logits_of(k, k_pos, window, by):
        return masked_logits(
            q_ref[...], k, k_pos, q_pos_ref[...], window, scale=scale, softcap=softcap, k_scale=by
        )

    def accumulate(parts, lanes_max, values_of):
        """Adds the slots whose logits are in `logits_ref`, given the maximum of each lane.

        `values_of` a part are its values and, of int8 values, their factors [1, S].
        """
        m = m_ref[...]
        m_new = jnp.broadcast_to(lanes_max.max(-1, keepdims=True), m.shape)
        shrink = jnp.exp2(m - m_new)
        mass, acc = mass_ref[...] * shrink, acc_ref[...] * _across(shrink, acc_ref.shape[1])
        for part in parts:
            p = jnp.exp2(logits_ref[:, part] - _across(m_new, part.stop - part.start))
            mass = sum((p[:, i : i + LANES] for i in range(0, p.shape[1], LANES)), mass)
            v, by = values_of(part)
            p = p if by is None else p * by
            v = v.astype(q_ref.dtype)
            acc += jax.lax.dot_general(
                p.astype(v.dtype), v, (((1,), (0 if v.shape[1] == acc.shape[1] else 1,)), ((), ())),
                preferred_element_type=jnp.float32,
                precision=jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None,
            )  # fmt: skip
        m_ref[...], mass_ref[...], acc_ref[...] = m_new, mass, acc

    def store(part, logits, seen, lanes_max):
        logits = jnp.where(seen, logits, -jnp.inf)
        logits_ref[:, part] = logits
        chunks = (logits[:, i : i + LANES] for i in range(0, logits.shape[1], LANES))
        return functools.reduce(jnp.maximum, chunks, lanes_max)

    @pl.when(block == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, FLOOR)
        mass_ref[...] = jnp.zeros_like(mass_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        part = slice(0, own_k_ref.shape[0])
        everywhere = jnp.zeros((1, part.stop), jnp.int32)
        logits, _ = logits_of(own_k_ref[...], everywhere, None, of_part(own_k_by, part))
        seen = own_seen_ref[...].astype(jnp.int32) > 0
        values = own_v_ref[...], of_part(own_v_by, part)
        accumulate([part], store(part, logits, seen, m_ref[...]), lambda _: values)

    @pl.when(live(bounds_ref, block, size))
    def _():
        parts = [slice(i, min(i + _PART, size)) for i in range(0, size, _PART)]
        lanes_max = m_ref[...]
        for part in parts:
            k, k_pos = slots_of(k_ref, part), k_pos_ref[:, part]
            logits, seen = logits_of(k, k_pos, window, of_part(k_by, part))
            lanes_max = store(part, logits, seen, lanes_max)

        def values_of(part):
            v, k_pos = slots_of(v_ref, part), k_pos_ref[:, part]
            if v_by is None:
                return _alive(v, k_pos), None
            return v, jnp.where(k_pos >= 0, v_by[:, part], 0.0)

        accumulate(parts, lanes_max, values_of)

    @pl.when(block == pl.num_programs(3) - 1)
    def _():
        mass = mass_ref[...].sum(-1, keepdims=True)
        seen = mass > 0
        mass = jnp.where(seen, mass, 1.0)
        out_ref[...] = (acc_ref[...] / mass).astype(out_ref.dtype)
        lse = jnp.where(seen, m_ref[:, :1] / LOG2E + jnp.log(mass), -jnp.inf)
        lse_ref[...] = jnp.broadcast_to(lse, m_ref.shape).T[:1]


def _alive(v, k_pos):
    """Values [S, H] or [H, S] with empty slots set to zero: they may be NaN, and 0 * NaN is NaN."""
    slots, dim = v.shape
    if slots != k_pos.shape[1]:
        return jnp.where(k_pos >= 0, v, jnp.zeros_like(v))
    alive = jnp.broadcast_to((k_pos >= 0).astype(jnp.int32), (LANES, slots)).T
    alive = jnp.concatenate([alive] * -(-dim // LANES), axis=1)[:, :dim]
    return jnp.where(alive > 0, v, jnp.zeros_like(v))


def _factors(scales: Scales | None, own: int, size: int, at_own: Any, at_scale: Any):
    """The factors of int8 keys and values [B, K, 1, slots], padded to blocks, and their blocks."""
    if scales is None:
        return [], []
    padded = [pad_axis(a, 2, own)[:, :, None] for a in (scales.own_k, scales.own_v)]
    padded += [pad_axis(a, 2, size)[:, :, None] for a in (scales.k, scales.v)]
    own_spec = pl.BlockSpec((None, None, 1, padded[0].shape[3]), at_own)
    spec = pl.BlockSpec((None, None, 1, size), at_scale)
    return padded, [own_spec, own_spec, spec, spec]


def attend(
    q: jax.Array,  # [B, K, G, P, H]
    own: tuple[jax.Array, jax.Array],  # the rows' own keys and values [B, K, P, H]
    context: tuple[jax.Array, jax.Array],  # keys and values [(L,) B, K, S, H]
    places: Places,
    *,
    scale: float,
    softcap: float | None,
    key_block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, P, H] in the dtype of `q`, log-sum-exp [B, K, G, P] float32.

    Most of its lines are the blocks and index maps of one `pallas_call`, which belong together.
    """
    batch, heads, groups, nodes, dim = q.shape
    ctx_k, ctx_v = context
    if places.layer is None:
        ctx_k, ctx_v = ctx_k[None], ctx_v[None]
    rows = groups * nodes
    tile = min(_ROWS, -(-rows // 16) * 16)
    stacked = pad_axis(q.reshape(batch, heads, rows, dim), 2, tile)
    row_pos = pad_axis(jnp.tile(places.q_pos, (1, groups)), 1, tile, -1)[..., None]
    own_seen: Any = places.own_seen
    seen = pad_axis(pad_axis(jnp.tile(own_seen, (1, groups, 1)), 1, tile), 2, LANES)
    own_k, own_v = (pad_axis(a, 2, LANES) for a in own)
    size = min(block_size(ctx_k[0], key_block), _LOGITS // tile // LANES * LANES)
    pos = pad_axis(places.k_pos, 2, size, -1)[:, :, None]
    per_head = pos.shape[1] > 1
    numbers = (places.window, places.layer)
    numbers = jnp.stack([jnp.asarray(0 if n is None else n, jnp.int32) for n in numbers])
    tiles, blocks = stacked.shape[2] // tile, pos.shape[3] // size

    def at_rows(b, h, i, j, *_):
        return b, h, i, 0

    def at_own(b, h, *_):
        return b, h, 0, 0

    def at_keys(b, h, i, j, *refs):
        return refs[1][1], b, h, read_at(refs[0], b * heads + h, j, size=size)

    def at_pos(b, h, i, j, *refs):
        return b, h if per_head else 0, 0, read_at(refs[0], b * heads + h, j, size=size)

    def at_scale(b, h, i, j, *refs):
        return b, h, 0, read_at(refs[0], b * heads + h, j, size=size)

    slots = ctx_k.shape[3]
    read = 2 * batch * heads * slots * dim * ctx_k.dtype.itemsize
    factors, factor_specs = _factors(places.scales, LANES, size, at_own, at_scale)
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel, scale=scale, softcap=softcap, windowed=places.window is not None, size=size
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, tiles, blocks),
            in_specs=[
                pl.BlockSpec((None, None, tile, dim), at_rows),
                pl.BlockSpec((None, tile, 1), lambda b, h, i, *_: (b, i, 0)),
                pl.BlockSpec((None, None, *own_k.shape[2:]), at_own),
                pl.BlockSpec((None, None, *own_v.shape[2:]), at_own),
                pl.BlockSpec((None, tile, seen.shape[2]), lambda b, h, i, *_: (b, i, 0)),
                slots_spec(dim, size, 3, at_keys),
                slots_spec(dim, size, 3, at_keys),
                pl.BlockSpec((None, None, 1, size), at_pos),
                *factor_specs,
            ],
            out_specs=[
                pl.BlockSpec((None, None, tile, dim), at_rows),
                pl.BlockSpec((None, None, 1, tile), lambda b, h, i, *_: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((tile, LANES), jnp.float32),
                pltpu.VMEM((tile, LANES), jnp.float32),
                pltpu.VMEM((tile, dim), jnp.float32),
                pltpu.VMEM((tile, max(size, own_k.shape[2])), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(stacked.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, stacked.shape[2]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * rows * slots * dim,
            transcendentals=batch * heads * rows * slots,
            bytes_accessed=read,
        ),
        name="block_attention",
    )(
        places.bounds,
        numbers,
        stacked,
        row_pos,
        own_k,
        own_v,
        seen,
        as_stored(ctx_k),
        as_stored(ctx_v),
        pos,
        *factors,
    )
    out = out[:, :, :rows].reshape(q.shape)
    return out, lse[:, :, 0, :rows].reshape(batch, heads, groups, nodes)
