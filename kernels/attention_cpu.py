"""Attention of few rows on CPUs: each live entry of the context is read once, where it lies.

Decoding and verification read a whole layer of the cache for a few rows, so their time should be
that of reading it. XLA on CPU sweeps all slots, dead ones too, in several passes. Here threads
take ranges of slots of one row of the batch and one KV head. Each gathers the entries that some row
may see, a block at a time, and keeps a running softmax. The ranges do not depend on the number of
rows or threads, and neither do the sums of a row.

Letters: B batch, P rows of the block, N query heads, K KV heads, G = N / K, H head dim, S slots,
L layers, R = P * G rows that read the same keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from lookahead_jax.kernels.common import FLOOR, NEVER, Own, Slots, own_seen, slot_bounds
from lookahead_jax.kernels.cpu_calls import (
    Plan,
    cores_to_use,
    data_of,
    dimension_of,
    layout_is_known,
    register_parallel,
)
from lookahead_jax.kernels.cpu_code import (
    BYTES,
    FLOAT,
    I32,
    I64,
    INTEGERS,
    LANES,
    ZEROS,
    add_lanes,
    carried,
    exp,
    floats,
    fma,
    larger,
    load,
    load_floats,
    loop,
    max_lanes,
    prefetch,
    splat,
    store,
    tanh,
    transposed,
)
from lookahead_jax.kernels.dispatch import target_platform

MAX_ROWS = 256  # P; with more, XLA's products are as fast
MAX_GROUPED_ROWS = 2048  # R; their statistics lie on the stack
MAX_HEAD_DIM = 256
SUMS = 16  # vectors that the products keep in registers
RANGE = 256  # slots of a part, at least
MAX_RANGES = 16
WAKING_US = 200.0  # a call that takes less is done before other threads have woken up

_STORED = {jnp.dtype("float32"): FLOAT, jnp.dtype("int8"): BYTES}
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
    stored = context[0].dtype
    if target_platform() != "cpu":
        return "it runs on CPUs"
    if not jax.sharding.get_abstract_mesh().empty:
        return "a mesh is in use"
    if not layout_is_known():
        return "the interface of XLA is of another version"
    if q.dtype != jnp.float32 or stored not in _STORED or own.k.dtype != stored:
        return f"queries of {q.dtype} and keys of {own.k.dtype} and {stored}"
    if rows > MAX_ROWS or rows * heads // own.k.shape[1] > MAX_GROUPED_ROWS:
        return f"{rows} rows of {heads} heads"
    if dim % LANES or dim > MAX_HEAD_DIM:
        return f"head dim {dim}"
    if context[0].shape[-2] == 0:
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
    seen = own_seen(own.visible, q_pos, window)
    integers = (0 if layer is None else layer, NEVER if window is None else window)
    numbers = jnp.asarray([scale, 1.0 if softcap is None else softcap], jnp.float32)
    factors = () if scales is None else (*own.scales, *scales)
    name = _register(q.shape[-1], k.dtype, softcap is not None, cores_to_use())
    rows = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    results = (jax.ShapeDtypeStruct(q.shape, jnp.float32), rows, rows)
    out, top, mass = jax.ffi.ffi_call(name, results, vmap_method="sequential")(
        q, own.k, own.v, seen, q_pos, k, v, pos, bounds,
        *(jnp.asarray(i, jnp.int32) for i in integers), numbers, *factors,
    )  # fmt: skip
    lse = jnp.where(mass > 0, top + jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)
    return out, lse.swapaxes(1, 2)


@functools.cache
def _register(dim: int, dtype: Any, capped: bool, cores: int) -> str:
    """Compiles the kernel and makes it known to XLA; the name of the target."""
    module = ir.Module(f"lookahead_attention_{dim}_{dtype}_{'capped' * capped}_{cores}")
    stored = _STORED[dtype]
    kinds = dict.fromkeys((*_ARRAYS, *_FACTORS, *_RESULTS), FLOAT)
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

    part = function("part", functools.partial(_part, dim=dim, capped=capped), [I64])
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
    layer = _clipped(b, layer, I64(0), b.sub(layers, I64(1)))
    layer_start = b.mul(b.mul(layer, units), b.mul(slots, I64(dim)))

    block = I64(LANES * _columns(dim))
    sixteenth = b.sdiv(b.add(slots, I64(MAX_RANGES - 1)), I64(MAX_RANGES))
    length = _largest(
        b, I64(RANGE), b.mul(b.sdiv(b.add(sixteenth, b.sub(block, I64(1))), block), block)
    )
    bounds = data_of(b, buffers["bounds"], I32)
    with carried(b, I64(0), units, 1, [I64(0), I64(0)]) as (unit, (longest, total), after):
        first, last = _range_of(b, bounds, unit, slots)
        filled = _largest(b, b.sub(last, first), I64(0))
        after += [_largest(b, longest, filled), b.add(total, filled)]
    longest, total = after
    ranges = _largest(b, I64(1), b.sdiv(b.add(longest, b.sub(length, I64(1))), length))

    # Nanoseconds on one core of 10 GB/s and 60 GFLOP/s.
    reading = b.mul(total, I64(round(2 * dim * (4 if stored is FLOAT else 1) / 10)))
    per_row = b.mul(b.sdiv(b.mul(rows, heads), kv_heads), I64(max(1, round(4 * dim / 60))))
    spent = _largest(b, reading, b.mul(total, per_row))
    threads = b.select(b.icmp_signed(">", spent, I64(round(1000 * WAKING_US))), I64(cores), I64(1))

    every_row = b.mul(b.mul(batch, rows), heads)
    scratch = b.mul(b.mul(ranges, every_row), I64(4 * (dim + 2)))
    sizes = [batch, rows, heads, kv_heads, slots, pos_heads, layer_start, ranges, length]
    return Plan([*addresses, *sizes], b.mul(units, ranges), threads, scratch)


def _columns(dim: int) -> int:
    """Vectors of entries in a block: the block's keys and values stay in the first cache."""
    return 4 if dim <= 64 else 2


def _largest(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed(">", x, y), x, y)


def _smallest(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed("<", x, y), x, y)


def _clipped(b: ir.IRBuilder, x: Any, lowest: Any, highest: Any) -> Any:
    return _smallest(b, _largest(b, x, lowest), highest)


def _range_of(b: ir.IRBuilder, bounds: Any, unit: Any, slots: Any) -> tuple[Any, Any]:
    """The slots worth reading for a row of the batch and a KV head."""
    ends = (b.add(b.mul(unit, I64(2)), I64(i)) for i in range(2))
    first, last = (b.sext(b.load(b.gep(bounds, [end])), I64) for end in ends)
    return _largest(b, first, I64(0)), _smallest(b, last, slots)


def _sum_of_products(b: ir.IRBuilder, *pairs: tuple[Any, Any]) -> Any:
    total = I64(0)
    for x, y in pairs:
        total = b.add(total, b.mul(x, y))
    return total


def _part(b: ir.IRBuilder, a: dict[str, Any], part: Any, *, dim: int, capped: bool) -> None:
    """A range of slots of one row of the batch and one KV head; the first has the own keys, too."""
    Part(b, a, part, dim, capped).write()


class Part:
    """Writes the code of a part: gathers a block of entries, then each tile of rows attends."""

    def __init__(self, b: ir.IRBuilder, a: dict[str, Any], part: Any, dim: int, capped: bool):
        self.b, self.a, self.dim, self.capped = b, a, dim, capped
        self.columns = _columns(dim)
        self.block = LANES * self.columns
        self.tile = SUMS // self.columns
        self.quantized = "k_scale" in a
        self.unit, self.range = b.sdiv(part, a["ranges"]), b.srem(part, a["ranges"])
        self.batch, self.head = b.sdiv(self.unit, a["K"]), b.srem(self.unit, a["K"])
        self.groups = b.sdiv(a["N"], a["K"])
        self.rows = b.mul(a["P"], self.groups)
        many = MAX_GROUPED_ROWS + self.tile
        self.keys = self._array(FLOAT, dim * self.block)  # [H, block]
        self.probabilities = self._array(FLOAT, self.tile * self.block)
        self.mask = self._array(BYTES, MAX_ROWS * self.block)
        self.key_at, self.value_at = (self._array(I64, self.block) for _ in range(2))
        self.pos = self._array(I32, self.block)
        self.query_at, self.sum_at, self.mask_at = (self._array(I64, many) for _ in range(3))
        self.top, self.mass = (self._array(FLOAT, many) for _ in range(2))
        self.spare = self._array(FLOAT, dim)  # sums of rows that fill the last tile
        if self.quantized:
            self.values = self._array(FLOAT, self.block * dim)
            self.key_scale, self.value_scale = (self._array(FLOAT, self.block) for _ in range(2))

    def _array(self, kind: ir.Type, size: int) -> Any:
        array: Any = self.b.alloca(kind, I64(size))
        array.align = 64
        return array

    def _put(self, value: Any, array: Any, index: Any) -> None:
        self.b.store(value, self.b.gep(array, [index]))

    def _get(self, array: Any, index: Any) -> Any:
        return self.b.load(self.b.gep(array, [index]))

    def write(self) -> None:
        b, a = self.b, self.a
        self._begin()
        first, last = _range_of(b, a["bounds"], self.unit, a["S"])
        first = b.add(first, b.mul(self.range, a["range"]))
        last = _smallest(b, last, b.add(first, a["range"]))
        own = b.select(b.icmp_signed("==", self.range, I64(0)), a["P"], I64(0))
        reach = self._reach()
        check, body, after = (b.append_basic_block() for _ in range(3))
        before = b.block
        b.branch(check)
        b.position_at_end(check)
        own_from, slot = b.phi(I64), b.phi(I64)
        own_from.add_incoming(I64(0), before)
        slot.add_incoming(first, before)
        more = b.or_(b.icmp_signed("<", own_from, own), b.icmp_signed("<", slot, last))
        b.cbranch(more, body, after)
        b.position_at_end(body)
        own_to = _smallest(b, own, b.add(own_from, I64(self.block)))
        count, next_slot = self._gather((own_from, own_to), (slot, last), reach)
        with b.if_then(b.icmp_signed(">", count, I64(0))):
            self._transpose(count, next_slot)
            self._masks(own_from, own_to)
            with loop(b, I64(0), self.rows, self.tile) as row:
                self._attend(row, count)
        own_from.add_incoming(own_to, b.block)
        slot.add_incoming(next_slot, b.block)
        b.branch(check)
        b.position_at_end(after)
        self._end()

    def _begin(self) -> None:
        """Addresses of the rows' queries and sums; sums are zero and nothing is seen yet."""
        b, a, dim = self.b, self.a, I64(self.dim)
        every = b.mul(b.mul(a["B"], a["P"]), a["N"])
        self.sums = b.gep(a["scratch"], [b.mul(b.mul(self.range, every), dim)])
        self.statistics = b.gep(
            a["scratch"],
            [
                _sum_of_products(
                    b, (b.mul(a["ranges"], every), dim), (b.mul(self.range, every), I64(2))
                )
            ],
        )
        with loop(b, I64(0), b.add(self.rows, I64(self.tile))) as row:
            real = b.icmp_signed("<", row, self.rows)
            p = b.sdiv(_smallest(b, row, b.sub(self.rows, I64(1))), self.groups)
            start = b.mul(self._flat(row), dim)
            sums = b.select(real, b.gep(self.sums, [start]), self.spare)
            queries = b.gep(a["q"], [b.select(real, start, b.mul(self._flat(I64(0)), dim))])
            self._put(b.ptrtoint(queries, I64), self.query_at, row)
            self._put(b.ptrtoint(sums, I64), self.sum_at, row)
            self._put(b.mul(p, I64(self.block)), self.mask_at, row)
            self._put(ir.Constant(FLOAT, FLOOR), self.top, row)
            self._put(ir.Constant(FLOAT, 0.0), self.mass, row)
            with loop(b, I64(0), dim, LANES) as h:
                store(b, ZEROS, sums, h)

    def _flat(self, row: Any) -> Any:
        """The place of a row in [B, P, N]."""
        b, a = self.b, self.a
        p, g = b.sdiv(row, self.groups), b.srem(row, self.groups)
        of_p = b.mul(b.add(b.mul(self.batch, a["P"]), p), a["N"])
        return b.add(of_p, b.add(b.mul(self.head, self.groups), g))

    def _reach(self) -> tuple[Any, Any]:
        """The last and the first position that any row may see."""
        b, a = self.b, self.a
        never = I32(NEVER)
        start = b.mul(self.batch, a["P"])
        with carried(b, I64(0), a["P"], 1, [I32(-1), never]) as (p, (highest, lowest), after):
            q_pos = self._get(a["q_pos"], b.add(start, p))
            real = b.icmp_signed(">=", q_pos, I32(0))
            after += [
                _largest(b, highest, q_pos),
                _smallest(b, lowest, b.select(real, q_pos, never)),
            ]
        highest, lowest = after
        window = b.load(a["window"])
        return highest, _largest(b, I32(0), b.add(b.sub(lowest, window), I32(1)))

    def _gather(self, own: Any, slots: Any, reach: Any) -> tuple[Any, Any]:
        """Fills a block with own keys, then entries of the context; its size, and the next slot."""
        b, a, dim = self.b, self.a, I64(self.dim)
        (own_from, own_to), (slot, last), (nearest, farthest) = own, slots, reach
        own_start = b.mul(self.unit, a["P"])
        with loop(b, own_from, own_to) as j:
            at, i = b.add(own_start, j), b.sub(j, own_from)
            self._entry(i, ("own_k", "own_v"), at, b.mul(at, dim))
            self._put(I32(NEVER), self.pos, i)
        slots_start = b.mul(self.unit, a["S"])
        pos_unit = b.add(
            b.mul(self.batch, a["pos_heads"]),
            b.select(b.icmp_signed("==", a["pos_heads"], I64(1)), I64(0), self.head),
        )
        positions = b.gep(a["pos"], [b.mul(pos_unit, a["S"])])
        of_own = b.sub(own_to, own_from)
        check, body, after = (b.append_basic_block() for _ in range(3))
        before = b.block
        b.branch(check)
        b.position_at_end(check)
        count, s = b.phi(I64), b.phi(I64)
        count.add_incoming(of_own, before)
        s.add_incoming(slot, before)
        room = b.icmp_signed("<", count, I64(self.block))
        b.cbranch(b.and_(room, b.icmp_signed("<", s, last)), body, after)
        b.position_at_end(body)
        pos = self._get(positions, s)
        at = b.add(slots_start, s)
        self._entry(count, ("k", "v"), at, b.add(a["layer_start"], b.mul(at, dim)))
        self._put(pos, self.pos, count)
        live = b.and_(b.icmp_signed(">=", pos, farthest), b.icmp_signed("<=", pos, nearest))
        count.add_incoming(b.add(count, b.zext(live, I64)), b.block)
        s.add_incoming(b.add(s, I64(1)), b.block)
        b.branch(check)
        b.position_at_end(after)
        # The rest up to a whole vector repeats the first entry, and no row sees it.
        with loop(b, count, I64(self.block)) as i:
            for place in (self.key_at, self.value_at):
                self._put(self._get(place, I64(0)), place, i)
            self._put(I32(NEVER), self.pos, i)
            if self.quantized:
                self._put(ir.Constant(FLOAT, 0.0), self.key_scale, i)
        return count, s

    def _entry(self, i: Any, names: tuple[str, str], at: Any, start: Any) -> None:
        b, a = self.b, self.a
        places = (self.key_at, self.value_at)
        for name, place in zip(names, places, strict=True):
            self._put(b.ptrtoint(b.gep(a[name], [start]), I64), place, i)
        if self.quantized:
            for name, scale in zip(names, (self.key_scale, self.value_scale), strict=True):
                self._put(self._get(a[f"{name}_scale"], at), scale, i)

    def _transpose(self, count: Any, next_slot: Any) -> None:
        """The block's keys as [H, block]; of int8 the values as floats, too.

        Meanwhile the block's values arrive, and the keys of the slots after it.
        """
        b, a = self.b, self.a
        stored = a["k"].type
        line = 64 // (4 if stored.pointee is FLOAT else 1)
        after = b.mul(b.add(b.mul(self.unit, a["S"]), next_slot), I64(self.dim))
        after = b.gep(a["k"], [b.add(a["layer_start"], after)])
        with loop(b, I64(0), count, LANES) as first:
            rows = [
                b.inttoptr(self._get(self.key_at, b.add(first, I64(i))), stored)
                for i in range(LANES)
            ]
            values = [
                b.inttoptr(self._get(self.value_at, b.add(first, I64(i))), stored)
                for i in range(LANES)
            ]
            coming = b.gep(after, [b.mul(first, I64(self.dim))])
            with loop(b, I64(0), I64(self.dim), line) as h:
                for i, value in enumerate(values):
                    prefetch(b, b.gep(value, [h]))
                    prefetch(b, b.gep(coming, [b.add(h, I64(i * self.dim))]))
            with loop(b, I64(0), I64(self.dim), LANES) as h:
                columns = transposed(b, [load_floats(b, row, h) for row in rows])
                for i, column in enumerate(columns):
                    if self.quantized:
                        column = b.fmul(column, load(b, self.key_scale, first))
                    place = b.add(b.mul(b.add(h, I64(i)), I64(self.block)), first)
                    store(b, column, self.keys, place)
        if self.quantized:
            with loop(b, I64(0), count) as i:
                row = b.inttoptr(self._get(self.value_at, i), stored)
                scale = splat(b, self._get(self.value_scale, i))
                place = b.gep(self.values, [b.mul(i, I64(self.dim))])
                with loop(b, I64(0), I64(self.dim), LANES) as h:
                    store(b, b.fmul(load_floats(b, row, h), scale), place, h)
                self._put(b.ptrtoint(place, I64), self.value_at, i)

    def _masks(self, own_from: Any, own_to: Any) -> None:
        """Which of the P rows see which entries of the block."""
        b, a = self.b, self.a
        window = splat(b, b.load(a["window"]))
        with loop(b, I64(0), a["P"]) as p:
            q_pos = splat(b, self._get(a["q_pos"], b.add(b.mul(self.batch, a["P"]), p)))
            mask = b.gep(self.mask, [b.mul(p, I64(self.block))])
            for i in range(0, self.block, LANES):
                pos = load(b, self.pos, I64(i), INTEGERS)
                near = b.icmp_signed("<", b.sub(q_pos, pos), window)
                visible = b.and_(b.icmp_signed("<=", pos, q_pos), near)
                store(b, b.zext(visible, ir.VectorType(BYTES, LANES)), mask, I64(i))
            seen_row = b.mul(b.add(b.mul(self.batch, a["P"]), p), a["P"])
            with loop(b, own_from, own_to) as j:
                self._put(self._get(a["seen"], b.add(seen_row, j)), mask, b.sub(j, own_from))

    def _attend(self, row: Any, count: Any) -> None:
        """A tile of rows over the block: logits, running softmax, weighted values."""
        b = self.b
        rows = [b.add(row, I64(i)) for i in range(self.tile)]
        shrinks = self._softmax(rows, self._logits(rows))
        sums = [b.inttoptr(self._get(self.sum_at, r), FLOAT.as_pointer()) for r in rows]
        wide = self.columns
        for start in range(0, self.dim, LANES * wide):
            places = range(start, min(start + LANES * wide, self.dim), LANES)
            totals = [
                b.fmul(load(b, total, I64(h)), shrink)
                for total, shrink in zip(sums, shrinks, strict=True)
                for h in places
            ]
            with carried(b, I64(0), count, 1, totals) as (i, now, after):
                value = b.inttoptr(self._get(self.value_at, i), FLOAT.as_pointer())
                values = [load(b, value, I64(h)) for h in places]
                for r in range(self.tile):
                    share = self._get(self.probabilities, b.add(i, I64(r * self.block)))
                    share = splat(b, share)
                    for j, numbers in enumerate(values):
                        after.append(fma(b, share, numbers, now[r * len(values) + j]))
            for r, total in enumerate(sums):
                for j, h in enumerate(places):
                    store(b, after[r * len(places) + j], total, I64(h))

    def _logits(self, rows: list[Any]) -> list[list[Any]]:
        """Scaled, capped and masked: for each row of the tile the vectors of its logits."""
        b, a = self.b, self.a
        queries = [b.inttoptr(self._get(self.query_at, r), FLOAT.as_pointer()) for r in rows]
        columns = range(0, self.block, LANES)
        zeros = [ZEROS] * (self.tile * len(columns))
        with carried(b, I64(0), I64(self.dim), 1, zeros) as (h, now, dots):
            start = b.mul(h, I64(self.block))
            keys = [load(b, self.keys, b.add(start, I64(c))) for c in columns]
            for r, query in enumerate(queries):
                factor = splat(b, self._get(query, h))
                dots += [fma(b, factor, k, now[r * len(keys) + j]) for j, k in enumerate(keys)]
        scale, softcap = (splat(b, self._get(a["numbers"], I64(i))) for i in range(2))
        hidden = floats(float("-inf"))
        logits = []
        for r, row in enumerate(rows):
            mask = b.gep(self.mask, [self._get(self.mask_at, row)])
            mine = []
            for j, c in enumerate(columns):
                logit = b.fmul(dots[r * len(columns) + j], scale)
                if self.capped:
                    logit = b.fmul(softcap, tanh(b, b.fdiv(logit, softcap)))
                seen = load(b, mask, I64(c), ir.VectorType(BYTES, LANES))
                seen = b.icmp_unsigned("!=", seen, ir.Constant(seen.type, None))
                mine.append(b.select(seen, logit, hidden))
            logits.append(mine)
        return logits

    def _softmax(self, rows: list[Any], logits: list[list[Any]]) -> list[Any]:
        """Stores the probabilities of a tile; the factors of the sums before."""
        b = self.b
        shrinks = []
        for r, (row, mine) in enumerate(zip(rows, logits, strict=True)):
            highest = functools.reduce(lambda x, y: larger(b, x, y), mine)
            before = self._get(self.top, row)
            top = larger(b, max_lanes(b, highest), before)
            self._put(top, self.top, row)
            shrink = exp(b, splat(b, b.fsub(before, top)))
            top = splat(b, top)
            shares = [exp(b, b.fsub(logit, top)) for logit in mine]
            for j, share in enumerate(shares):
                store(b, share, self.probabilities, I64(r * self.block + j * LANES))
            new = add_lanes(b, functools.reduce(b.fadd, shares))
            old = b.fmul(self._get(self.mass, row), b.extract_element(shrink, I32(0)))
            self._put(b.fadd(old, new), self.mass, row)
            shrinks.append(shrink)
        return shrinks

    def _end(self) -> None:
        """Keeps each row's maximum and mass beside its sums."""
        b = self.b
        with loop(b, I64(0), self.rows) as row:
            place = b.mul(self._flat(row), I64(2))
            self._put(self._get(self.top, row), self.statistics, place)
            self._put(self._get(self.mass, row), self.statistics, b.add(place, I64(1)))


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
