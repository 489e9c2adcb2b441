"""Attention of few rows on CPUs: each live entry of the context is read once, where it lies.

Decoding and verification read a whole layer of the cache for a few rows, so their time should be
that of reading it. XLA on CPU sweeps all slots, dead ones too, in several passes. Here threads
take ranges of slots of one row of the batch and one KV head. Each gathers the entries that some row
may see, a block at a time, and keeps a running softmax. Results do not depend on the number of
threads; on the other rows of the block they depend by rounding, because these decide which entries
share a block.

Letters: B batch, P rows of the block, N query heads, K KV heads, G = N / K, H head dim, S slots,
L layers, R = P * G rows that read the same keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from lookahead_jax.kernels.attention_cpu_part import (
    MAX_GROUPED_ROWS,
    MAX_ROWS,
    PartWriter,
    columns_of,
    range_of,
)
from lookahead_jax.kernels.common import FLOOR, NEVER, Own, Slots, own_seen, slot_bounds
from lookahead_jax.kernels.cpu_calls import (
    Plan,
    cores_to_use,
    data_of,
    dimension_of,
    layout_is_known,
    made_once,
    register_parallel,
)
from lookahead_jax.kernels.cpu_code import (
    BYTES,
    FLOAT,
    I32,
    I64,
    LANES,
    SIZES,
    STORED,
    ZEROS,
    carried,
    exp,
    floats,
    fma,
    larger,
    larger_int,
    load,
    loop,
    smaller_int,
    splat,
    store,
)
from lookahead_jax.kernels.dispatch import target_platform

MAX_HEAD_DIM = 256
RANGE = 256  # slots of a part, at least
MAX_RANGES = 16
WAKING_US = 200.0  # a call that takes less is done before other threads have woken up

# Arguments and results in the order of XLA's call, and the types of their elements.
_ARRAYS = (
    "q", "own_k", "own_v", "seen", "q_pos", "k", "v", "pos", "bounds", "layer", "window", "numbers",
)  # fmt: skip
_FACTORS = ("own_k_scale", "own_v_scale", "k_scale", "v_scale")
_RESULTS = ("out", "top", "mass")
_SIZES = ("B", "P", "N", "K", "S", "pos_heads", "layer_start", "ranges", "range")


def unsupported(q: jax.Array, own: Own, context: tuple[jax.Array, ...]) -> str | None:
    """Why the kernel does not take these arguments, or None.

    It cannot be split over devices, so under a mesh XLA's form runs.
    """
    _, rows, heads, dim = q.shape
    k, v, _ = context
    if target_platform() != "cpu":
        return "it runs on CPUs"
    if not jax.sharding.get_abstract_mesh().empty:
        return "a mesh is in use"
    if not layout_is_known():
        return "the interface of XLA is of another version"
    stored = sorted({str(array.dtype) for array in (k, v, own.k, own.v)})
    if q.dtype not in (jnp.float32, jnp.bfloat16) or len(stored) > 1 or k.dtype.name not in STORED:
        return f"queries of {q.dtype}, and keys and values of {', '.join(stored)}"
    if (k.dtype == jnp.int8) == (own.scales is None):
        return f"keys of {k.dtype} {'without' if own.scales is None else 'with'} scales"
    if rows > MAX_ROWS or rows * heads // own.k.shape[1] > MAX_GROUPED_ROWS:
        return f"{rows} rows of {heads} heads"
    if dim % LANES or dim > MAX_HEAD_DIM or v.shape != k.shape:
        return f"head dim {dim}, and values [..., {v.shape[-1]}]"
    if k.shape[-2] == 0:
        return "the context has no slots"
    return None


def attend(
    q: jax.Array,
    own: Own,
    q_pos: jax.Array,
    context: tuple[jax.Array, jax.Array, jax.Array],
    *,
    scale: float,
    softcap: float | None,
    window: jax.Array | int | None,
    slots: Slots | None,
    layer: jax.Array | None,
    scales: tuple[jax.Array, jax.Array] | None,
    key_block: int | None,
) -> tuple[jax.Array, jax.Array]:
    """`attention.block_attention` without sinks, for arguments that are not `unsupported`.

    `key_block` is of other implementations, whose results differ by it in rounding only.
    """
    k, v, pos = context
    if layer is None:
        k, v = k[None], v[None]
    bounds = slot_bounds(slots, q.shape[0], own.k.shape[1], k.shape[-2])
    seen = own_seen(own.visible, q_pos, window).astype(jnp.bool_)
    integers = (0 if layer is None else layer, NEVER if window is None else window)
    numbers = jnp.asarray([scale, 1.0 if softcap is None else softcap], jnp.float32)
    factors = () if scales is None or own.scales is None else (*own.scales, *scales)
    name = _register(q.shape[-1], k.dtype, softcap is not None, cores_to_use())
    rows = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    results = (jax.ShapeDtypeStruct(q.shape, jnp.float32), rows, rows)
    out, top, mass = jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        q.astype(jnp.float32), own.k, own.v, seen, q_pos.astype(jnp.int32), k, v,
        pos.astype(jnp.int32), bounds, *(jnp.asarray(i, jnp.int32) for i in integers), numbers,
        *factors,
    )  # fmt: skip
    lse = jnp.where(mass > 0, top + jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)
    return out.astype(q.dtype), lse.swapaxes(1, 2)


@made_once
def _register(dim: int, dtype: Any, capped: bool, cores: int) -> str:
    """Compiles the kernel and makes it known to XLA; the name of the target."""
    module = ir.Module(f"lookahead_attention_{dim}_{dtype}_{'capped' * capped}_{cores}")
    stored = STORED[dtype.name]
    kinds: dict[str, Any] = dict.fromkeys((*_ARRAYS, *_FACTORS, *_RESULTS), FLOAT)
    kinds |= dict.fromkeys(("own_k", "own_v", "k", "v"), stored) | {"seen": BYTES}
    kinds |= dict.fromkeys(("q_pos", "pos", "bounds", "layer", "window"), I32)
    inputs = _ARRAYS + _FACTORS * (stored is BYTES)
    names = (*inputs, *_RESULTS, *_SIZES, "scratch")

    def unpack(b: ir.IRBuilder, values: Any) -> dict[str, Any]:
        numbers = {n: b.load(b.gep(values, [I64(i)])) for i, n in enumerate(names)}
        arrays = {n: b.inttoptr(a, kinds[n].as_pointer()) for n, a in numbers.items() if n in kinds}
        scratch = b.inttoptr(numbers["scratch"], FLOAT.as_pointer())
        return numbers | arrays | {"scratch": scratch}

    def function(name: str, write: Any, extra: list[ir.Type]) -> ir.Function:
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), *extra])
        made = ir.Function(module, kind, name)
        made.linkage = "internal"
        b = ir.IRBuilder(made.append_basic_block())
        write(b, unpack(b, made.args[0]), *made.args[1:])
        b.ret_void()
        return made

    def write_part(b: ir.IRBuilder, a: dict[str, Any], number: Any) -> None:
        PartWriter(b, a, number, dim=dim, capped=capped).write()

    part = function("part", write_part, [I64])
    join = function("join", functools.partial(_join, dim=dim), [])
    register_parallel(
        module,
        plan=functools.partial(_plan, inputs=inputs, dim=dim, stored=stored, cores=cores),
        run=lambda b, values, number: b.call(part, [values, number]),
        finish=lambda b, values: b.call(join, [values]),
        helped=cores > 1,
    )
    return module.name


def _plan(
    b: ir.IRBuilder, arguments: Any, results: Any, *, inputs: Any, dim: int, stored: Any, cores: int
) -> Plan:
    """Addresses, sizes and ranges of slots; other threads are asked if they save more than time."""
    buffers = {n: b.load(b.gep(arguments, [I64(i)])) for i, n in enumerate(inputs)}
    buffers |= {n: b.load(b.gep(results, [I64(i)])) for i, n in enumerate(_RESULTS)}
    addresses = [b.ptrtoint(data_of(b, buffer, BYTES), I64) for buffer in buffers.values()]
    batch, rows, heads = (dimension_of(b, buffers["q"], i) for i in range(3))
    layers, _, kv_heads, slots = (dimension_of(b, buffers["k"], i) for i in range(4))
    pos_heads = dimension_of(b, buffers["pos"], 1)
    units = b.mul(batch, kv_heads)
    layer = b.sext(b.load(data_of(b, buffers["layer"], I32)), I64)
    layer = larger_int(b, smaller_int(b, layer, b.sub(layers, I64(1))), I64(0))
    layer_start = b.mul(b.mul(layer, units), b.mul(slots, I64(dim)))

    block = I64(LANES * columns_of(dim))
    sixteenth = b.sdiv(b.add(slots, I64(MAX_RANGES - 1)), I64(MAX_RANGES))
    length = larger_int(
        b, I64(RANGE), b.mul(b.sdiv(b.add(sixteenth, b.sub(block, I64(1))), block), block)
    )
    bounds = data_of(b, buffers["bounds"], I32)
    with carried(b, I64(0), units, 1, [I64(0), I64(0)]) as (unit, (longest, total), after):
        first, last = range_of(b, bounds, unit, slots)
        filled = larger_int(b, b.sub(last, first), I64(0))
        after += [larger_int(b, longest, filled), b.add(total, filled)]
    longest, total = after
    ranges = larger_int(b, I64(1), b.sdiv(b.add(longest, b.sub(length, I64(1))), length))

    # Nanoseconds on one core of 10 GB/s and 60 GFLOP/s.
    reading = b.mul(total, I64(round(2 * dim * SIZES[stored] / 10)))
    per_row = b.mul(b.sdiv(b.mul(rows, heads), kv_heads), I64(max(1, round(4 * dim / 60))))
    spent = larger_int(b, reading, b.mul(total, per_row))
    threads = b.select(b.icmp_signed(">", spent, I64(round(1000 * WAKING_US))), I64(cores), I64(1))

    every_row = b.mul(b.mul(batch, rows), heads)
    scratch = b.mul(b.mul(ranges, every_row), I64(4 * (dim + 2)))
    sizes = [batch, rows, heads, kv_heads, slots, pos_heads, layer_start, ranges, length]
    return Plan([*addresses, *sizes], b.mul(units, ranges), threads, scratch)


def _join(b: ir.IRBuilder, a: dict[str, Any], *, dim: int) -> None:
    """The ranges of each row together: its output, maximum and mass."""
    every = b.mul(b.mul(a["B"], a["P"]), a["N"])
    statistics = b.gep(a["scratch"], [b.mul(b.mul(a["ranges"], every), I64(dim))])

    def statistic(part: Any, row: Any, which: int) -> Any:
        place = b.add(b.mul(b.add(b.mul(part, every), row), I64(2)), I64(which))
        return b.load(b.gep(statistics, [place]))

    with loop(b, I64(0), every) as row:
        start = ir.Constant(FLOAT, FLOOR)
        with carried(b, I64(0), a["ranges"], 1, [start]) as (part, (top,), after):
            after.append(larger(b, statistic(part, row, 0), top))
        (top,) = after
        nothing = [ZEROS] * (1 + dim // LANES)
        with carried(b, I64(0), a["ranges"], 1, nothing) as (part, (mass, *sums), after):
            share = exp(b, splat(b, b.fsub(statistic(part, row, 0), top)))
            after.append(fma(b, share, splat(b, statistic(part, row, 1)), mass))
            place = b.mul(b.add(b.mul(part, every), row), I64(dim))
            for i, total in enumerate(sums):
                numbers = load(b, a["scratch"], b.add(place, I64(i * LANES)))
                after.append(fma(b, share, numbers, total))
        mass, *sums = after
        divisor = b.select(b.fcmp_ordered("==", mass, ZEROS), floats(1.0), mass)
        for i, total in enumerate(sums):
            place = b.add(b.mul(row, I64(dim)), I64(i * LANES))
            store(b, b.fdiv(total, divisor), a["out"], place)
        b.store(top, b.gep(a["top"], [row]))
        b.store(b.extract_element(mass, I32(0)), b.gep(a["mass"], [row]))
