"""Importance scoring on TPU: two Pallas kernels, each one sweep over the keys.

`row_lse` finds the log-sum-exp of every observing row, `column_scores` sums (or maximises) each
key's probabilities over the rows of a head. A grid step holds one block of keys and one tile of
observers; the G query heads of a KV head share the keys, their rows stacked, so that the matrix
unit sees G * tile rows. Nothing of size [M, T] leaves the chip's vector memory.

Letters: B batch, M observing rows, N query heads, K KV heads, G = N / K, H head dim, T entries.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lookahead_jax.kernels.reductions import Finish

_FLOOR = -1e30  # of the running maximum: a row that sees nothing keeps it
_NEVER = jnp.iinfo(jnp.int32).max  # position of an empty slot, as the kernels compare it
LOG2E = 1.0 / math.log(2.0)
_LANES = 128
_STATISTICS_BLOCK = 512  # keys whose logits exist at once while row sums are found
_ROWS = 256  # rows of a tile, all heads of a group together
BLOCK_BYTES = 1 << 20  # of keys in a grid step, chosen from the compiler's static schedule


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    total, head_dim = k.shape[-2:]
    if head_dim % 64:
        return f"head dim {head_dim} is not a multiple of 64"
    if total % 128:
        return f"{total} keys are not a multiple of 128"
    if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype:
        return f"queries {q.dtype} and keys {k.dtype} are not both bfloat16 or float32"
    return None


def observer_tile(rows: int, groups: int) -> int:
    """Rows per head of a tile: a multiple of 16 (a bfloat16 tile), at most _ROWS for the group."""
    most = max(_ROWS // groups // 16, 1) * 16
    return min(most, -(-rows // 16) * 16)


def pad_axis(a: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    """`a` with an axis grown to a multiple."""
    grow = [(0, 0)] * a.ndim
    grow[axis] = (0, -a.shape[axis] % multiple)
    return jnp.pad(a, grow, constant_values=value)


def _bounds(bounds_ref):
    """The slots worth reading for this grid step's row and head: first, one past the last."""
    at = 2 * (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1))
    return bounds_ref[at], bounds_ref[at + 1]


def live(bounds_ref, block, size: int):
    """Whether a block of keys holds any slot worth reading for this row and head."""
    first, last = _bounds(bounds_ref)
    return (block * size < last) & ((block + 1) * size > first)


def read_at(bounds_ref, batch, head, heads: int, block, size: int):
    """The block to have in memory: clamped to the live ones, so that dead ones cost no copy."""
    at = 2 * (batch * heads + head)
    last = jax.lax.div(jnp.maximum(bounds_ref[at + 1] - 1, 0), size)
    return jnp.clip(block, jnp.minimum(jax.lax.div(bounds_ref[at], size), last), last)


def as_stored(a: jax.Array) -> jax.Array:
    """Keys or values [..., S, H] as XLA keeps them: with slots last where H is below 128 lanes.

    The transposition is then one of names alone; the other form would be a padded copy.
    """
    return a.swapaxes(-1, -2) if a.shape[-1] < _LANES else a


def slots_spec(dim: int, size: int, lead: int, at) -> pl.BlockSpec:
    """A block of slots of an array that is `as_stored`: `at` gives its place on `lead` axes, and
    which block."""
    if dim >= _LANES:
        return pl.BlockSpec((*[None] * lead, size, dim), lambda *ids: (*at(*ids), 0))

    def transposed(*ids):
        *place, block = at(*ids)
        return *place, 0, block

    return pl.BlockSpec((*[None] * lead, dim, size), transposed)


def masked_logits(q, k, k_pos, q_pos, window, *, scale, softcap):
    """Logits [R, S] of one tile on one block, float32 in units of log(2), and who sees whom.

    Keys are [S, H], or [H, S] where that is how they are stored. Powers of two are what the
    hardware has: exp(x - lse) would cost one more product an element.
    """
    raw = jax.lax.dot_general(
        q, k, (((1,), (1 if k.shape[1] == q.shape[1] else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )  # fmt: skip
    if softcap is None:
        logits = raw * (scale * LOG2E)
    else:
        logits = (softcap * LOG2E) * jnp.tanh(raw * (scale / softcap))
    k_pos = jnp.where(k_pos < 0, _NEVER, k_pos)
    seen = k_pos <= q_pos
    if window is not None:
        seen &= k_pos > q_pos - window
    return logits, seen


def _lse_kernel(
    bounds_ref, window_ref, q_ref, q_pos_ref, k_ref, k_pos_ref, own_ref, own_seen_ref, out_ref,
    m_ref, mass_ref, *, scale, softcap, windowed, with_own, size,
):  # fmt: skip
    block = pl.program_id(3)
    groups, tile, dim = q_ref.shape
    settings = dict(scale=scale, softcap=softcap)
    window = window_ref[0] if windowed else None

    def accumulate(logits, seen):
        # Maxima and masses are kept per lane: nothing is reduced across lanes until the end.
        logits = jnp.where(seen, logits, -jnp.inf)
        parts = [logits[:, i : i + _LANES] for i in range(0, logits.shape[1], _LANES)]
        m = m_ref[...]
        m_new = functools.reduce(jnp.maximum, parts, m)
        new = sum(jnp.exp2(part - m_new) for part in parts)
        mass_ref[...] = mass_ref[...] * jnp.exp2(m - m_new) + new
        m_ref[...] = m_new

    def rows():
        q = q_ref[...].reshape(groups * tile, dim)
        return q, jnp.concatenate([q_pos_ref[...]] * groups, axis=0)

    @pl.when(block == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, _FLOOR)
        mass_ref[...] = jnp.zeros_like(mass_ref)
        if with_own:
            q, q_pos = rows()
            width = own_ref.shape[0]
            everywhere = jnp.zeros((1, width), jnp.int32)
            logits, _ = masked_logits(
                q, own_ref[...], everywhere, jnp.maximum(q_pos, 0), None, **settings
            )
            seen = own_seen_ref[...].astype(jnp.int32)
            accumulate(logits, jnp.concatenate([seen] * groups, axis=0) > 0)

    @pl.when(live(bounds_ref, block, size))
    def _():
        q, q_pos = rows()
        step = min(_STATISTICS_BLOCK, size)
        for i in range(0, size, step):
            part = slice(i, min(i + step, size))
            k = k_ref[part] if k_ref.shape[1] == dim else k_ref[:, part]
            accumulate(*masked_logits(q, k, k_pos_ref[:, part], q_pos, window, **settings))

    @pl.when(block == pl.num_programs(3) - 1)
    def _():
        m = m_ref[...].max(-1, keepdims=True)
        mass = (mass_ref[...] * jnp.exp2(m_ref[...] - m)).sum(-1, keepdims=True)
        seen = mass > 0
        lse = jnp.where(seen, m / LOG2E + jnp.log(jnp.where(seen, mass, 1.0)), -jnp.inf)
        out_ref[...] = lse.reshape(groups, tile, 1)


def _windows(x, kernel: int, join):
    """`join` over the `kernel` lanes that end at each lane, by doubling; lanes wrap around."""
    found, have, power, width = x, 1, x, 1  # `kernel` is odd: one lane is always among them
    while have < kernel:
        power = join(power, pltpu.roll(power, width, 1))
        width *= 2
        if kernel & width:
            found = join(found, pltpu.roll(power, have, 1))
            have += width
    return found


def _columns_kernel(
    bounds_ref, window_ref, q_ref, q_pos_ref, lse_ref, k_ref, k_pos_ref, valid_ref, out_ref,
    *scratch, scale, softcap, windowed, maximum, finish, size,
):  # fmt: skip
    block, part = pl.program_id(2), pl.program_id(3)
    groups, tile, dim = q_ref.shape
    sums_ref = scratch[0] if scratch else out_ref
    heads = sums_ref.shape[0]

    @pl.when(part == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(live(bounds_ref, block, size))
    def _():
        q = q_ref[...].reshape(groups * tile, dim)
        q_pos = jnp.concatenate([q_pos_ref[...]] * groups, axis=0)
        logits, seen = masked_logits(
            q, k_ref[...], k_pos_ref[...], q_pos, window_ref[0] if windowed else None,
            scale=scale, softcap=softcap,
        )  # fmt: skip
        p = jnp.where(seen, jnp.exp2(logits - lse_ref[...].reshape(groups * tile, 1)), 0.0)
        p = p.reshape(heads, groups * tile // heads, p.shape[-1])
        if maximum:
            sums_ref[...] = jnp.maximum(sums_ref[...], p.max(1))
        else:
            sums_ref[...] += p.sum(1)

    if not scratch:
        return

    def grouped(x):
        return x.max(0, keepdims=True) if finish.group == "max" else x.sum(0, keepdims=True)

    @pl.when(part == pl.num_programs(3) - 1)
    def _():
        if finish.pool is None:
            out_ref[...] = grouped(sums_ref[...])
            return
        # A block is pooled when its right neighbour is known: one step later.
        line_ref = scratch[1]
        kind, kernel = finish.pool
        join, padding = (jnp.maximum, -jnp.inf) if kind == "max" else (jnp.add, 0.0)
        inside = (valid_ref[...].astype(jnp.int32) > 0) & (block < pl.num_programs(2) - 1)
        new = jnp.where(inside, sums_ref[...], padding)

        @pl.when(block == 0)
        def _():
            line_ref[...] = jnp.full_like(line_ref, padding)

        @pl.when(block > 0)
        def _():
            line = jnp.concatenate([line_ref[...], new[:, :_LANES]], axis=1)
            pooled = _windows(line, kernel, join)
            pooled = pltpu.roll(pooled, pooled.shape[1] - (_LANES + kernel // 2), 1)
            out_ref[...] = grouped(pooled[:, :size])

        line_ref[:, :_LANES] = line_ref[:, size:]
        line_ref[:, _LANES:] = new


def finishes(finish: Finish) -> bool:
    """Whether `column_scores` can pool and reduce like this: blocks know one lane row beyond."""
    return finish.pool is None or finish.pool[1] < 2 * _LANES


def block_size(k: jax.Array, key_block: int | None) -> int:
    """Keys of a grid step: about BLOCK_BYTES of them, a multiple of 128, at most all."""
    most = BLOCK_BYTES // (k.shape[3] * k.dtype.itemsize) if key_block is None else key_block
    return min(max(most // 128, 1) * 128, k.shape[2])


def _layout(q, q_pos, k, k_pos, window, key_block):
    """Padded arguments of both kernels and the sizes of their grids."""
    groups = q.shape[2]
    tile = observer_tile(q.shape[3], groups)
    q = pad_axis(q, 3, tile)
    q_pos = pad_axis(q_pos, 1, tile, -1)[..., None]
    size = block_size(k, key_block)
    k_pos = pad_axis(k_pos, 2, size, -1)[:, :, None]
    windows = jnp.zeros(1, jnp.int32) if window is None else jnp.asarray(window).reshape(1)
    return q, q_pos, k_pos, windows, tile, size


def _cost(q, k, *, exponentials: int, written: int) -> pl.CostEstimate:
    """For XLA's scheduler: one product of all rows with all keys."""
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3] * k.shape[2]
    read = q.size * q.dtype.itemsize + k.size * k.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * pairs * q.shape[4],
        transcendentals=exponentials * pairs,
        bytes_accessed=read + written,
    )


def row_lse(
    q: jax.Array,  # [B, K, G, M, H]
    q_pos: jax.Array,  # [B, M] int32
    k: jax.Array,  # [B, K, T, H]
    k_pos: jax.Array,  # [B, K or 1, T] int32
    own: tuple[jax.Array, jax.Array] | None,  # keys [B, K, M, H], seen [B, M, M] int8
    bounds: jax.Array,  # [B * K * 2] int32 first slot worth reading and one past the last
    window: jax.Array | int | None,
    *,
    scale: float,
    softcap: float | None,
    key_block: int | None = None,
) -> jax.Array:
    """Log-sum-exp of each row's logits, float32 [B, K, G, M]; -inf where a row sees nothing."""
    batch, heads, groups, rows, dim = q.shape
    q, q_pos, k_pos, windows, tile, size = _layout(q, q_pos, k, k_pos, window, key_block)
    kernel = functools.partial(
        _lse_kernel, scale=scale, softcap=softcap, windowed=window is not None,
        with_own=own is not None, size=size,
    )  # fmt: skip
    if own is None:
        own = jnp.zeros((batch, heads, 1, dim), q.dtype), jnp.zeros((batch, 1, 1), jnp.int8)
    own_k = pad_axis(own[0], 2, _LANES)
    seen = pad_axis(pad_axis(own[1], 1, q.shape[3]), 2, _LANES)
    per_head = k_pos.shape[1] > 1
    tiles, blocks = q.shape[3] // tile, k_pos.shape[3] // size

    def at_rows(b, h, i, j, *_):
        return b, h, 0, i, 0

    def at_keys(b, h, i, j, bounds_ref, _):
        return b, h, read_at(bounds_ref, b, h, heads, j, size)

    def at_pos(b, h, i, j, bounds_ref, _):
        return b, h if per_head else 0, 0, read_at(bounds_ref, b, h, heads, j, size)

    lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, tiles, blocks),
            in_specs=[
                pl.BlockSpec((None, None, groups, tile, dim), at_rows),
                pl.BlockSpec((None, tile, 1), lambda b, h, i, j, *_: (b, i, 0)),
                slots_spec(dim, size, 2, at_keys),
                pl.BlockSpec((None, None, 1, size), at_pos),
                pl.BlockSpec((None, None, *own_k.shape[2:]), lambda b, h, *_: (b, h, 0, 0)),
                pl.BlockSpec((None, tile, seen.shape[2]), lambda b, h, i, *_: (b, i, 0)),
            ],
            out_specs=pl.BlockSpec((None, None, groups, tile, 1), at_rows),
            scratch_shapes=[pltpu.VMEM((groups * tile, _LANES), jnp.float32)] * 2,
        ),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:4], 1), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(q, k, exponentials=1, written=0),
        name="importance_row_lse",
    )(bounds, windows, q, q_pos, as_stored(k), k_pos, own_k, seen)
    return lse[..., :rows, 0]


def column_scores(
    q: jax.Array,  # [B, K, G, M, H]
    q_pos: jax.Array,  # [B, M] int32
    k: jax.Array,  # [B, K, T, H]
    k_pos: jax.Array,  # [B, K or 1, T] int32
    lse: jax.Array,  # [B, K, G, M] float32; +inf takes a row out
    bounds: jax.Array,  # [B * K * 2] int32
    window: jax.Array | int | None,
    valid: jax.Array | None,  # [B, K or 1, T] bool, entries that take part in the pooling
    *,
    scale: float,
    softcap: float | None,
    maximum: bool,
    finish: Finish | None,
    key_block: int | None = None,
) -> jax.Array:
    """exp(logits - lse) summed over the rows of a head (or their maximum): [B, K, G, T].

    With `finish` pooled, and reduced over the group: [B, K, T].
    """
    batch, heads, groups, _, dim = q.shape
    q, q_pos, k_pos, windows, tile, size = _layout(q, q_pos, k, k_pos, window, key_block)
    per_head = k_pos.shape[1] > 1
    tiles, blocks = q.shape[3] // tile, k_pos.shape[3] // size
    lse *= LOG2E
    pool = None if finish is None else finish.pool
    written, steps, scratch = 1 if finish else groups, blocks, []
    if finish is not None:
        reductions = {maximum, finish.group == "max"} | ({pool[0] == "max"} if pool else set())
        # Where all reductions are the same, a group is one head with more rows.
        apart = groups if len(reductions) > 1 else 1
        if apart > 1 or pool is not None:
            scratch.append(pltpu.VMEM((apart, size), jnp.float32))
        # The factors of means stand in the log-sum-exp.
        lse += math.log2(groups) if finish.group == "mean" else 0.0
        if pool is not None:
            lse += math.log2(pool[1]) if pool[0] == "avg" else 0.0
            scratch.append(pltpu.VMEM((apart, _LANES + size), jnp.float32))
            steps += 1
    lse = pad_axis(lse, 3, tile)[..., None]
    valid = jnp.ones((1, 1, size), bool) if valid is None else valid
    valid = pad_axis(valid.astype(jnp.int8), 2, size)[:, :, None]
    body = functools.partial(
        _columns_kernel, scale=scale, softcap=softcap, windowed=window is not None,
        maximum=maximum, finish=finish, size=size,
    )  # fmt: skip

    def at_rows(b, h, j, i, *_):
        return b, h, 0, i, 0

    def at_keys(b, h, j, i, bounds_ref, _):
        return b, h, read_at(bounds_ref, b, h, heads, j, size)

    def at_pos(b, h, j, i, bounds_ref, _):
        return b, h if per_head else 0, 0, read_at(bounds_ref, b, h, heads, j, size)

    def at_valid(b, h, j, *_):
        if pool is None:
            return 0, 0, 0, 0
        return b, h if valid.shape[1] > 1 else 0, 0, jnp.minimum(j, blocks - 1)

    def at_out(b, h, j, *_):
        return b, h, 0, j if pool is None else jnp.maximum(j - 1, 0)

    scores = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, steps, tiles),
            in_specs=[
                pl.BlockSpec((None, None, groups, tile, dim), at_rows),
                pl.BlockSpec((None, tile, 1), lambda b, h, j, i, *_: (b, i, 0)),
                pl.BlockSpec((None, None, groups, tile, 1), at_rows),
                slots_spec(dim, size, 2, at_keys),
                pl.BlockSpec((None, None, 1, size), at_pos),
                pl.BlockSpec((None, None, 1, size), at_valid),
            ],
            out_specs=pl.BlockSpec((None, None, written, size), at_out),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, written, k.shape[2]), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel", "parallel", "parallel" if pool is None else "arbitrary", "arbitrary"
            )
        ),
        cost_estimate=_cost(q, k, exponentials=1, written=4 * batch * heads * written * k.shape[2]),
        name="importance_column_scores",
    )(bounds, windows, q, q_pos, lse, as_stored(k), k_pos, valid)  # fmt: skip
    return scores if finish is None else scores[:, :, 0]
