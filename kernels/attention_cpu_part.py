"""The code of a part of attention on CPUs: some rows over a range of slots (attention_cpu.py).

Letters: B batch, P rows of the block, N query heads, K KV heads, G = N / K, H head dim, S slots,
R = P * G rows that read the same keys.
"""

import functools
from typing import Any

from llvmlite import ir

from lookahead_jax.kernels.common import FLOOR, NEVER
from lookahead_jax.kernels.cpu_code import (
    BYTES,
    FLOAT,
    I32,
    I64,
    INTEGERS,
    LANES,
    SIZES,
    ZEROS,
    add_lanes,
    carried,
    exp,
    floats,
    fma,
    larger,
    larger_int,
    load,
    load_floats,
    loop,
    max_lanes,
    prefetch,
    smaller_int,
    splat,
    store,
    tanh,
    transposed,
)

MAX_ROWS = 256  # P; their masks lie on the stack, and chunks of prompts are larger
MAX_GROUPED_ROWS = 2048  # R; so do their statistics
SUMS = 16  # vectors that the products keep in registers


def columns_of(dim: int) -> int:
    """Vectors of entries in a block: the block's keys and values stay in the first cache."""
    return 4 if dim <= 64 else 2


def range_of(b: ir.IRBuilder, bounds: Any, unit: Any, slots: Any) -> tuple[Any, Any]:
    """The slots worth reading for a row of the batch and a KV head."""
    ends = (b.add(b.mul(unit, I64(2)), I64(i)) for i in range(2))
    first, last = (b.sext(b.load(b.gep(bounds, [end])), I64) for end in ends)
    return larger_int(b, first, I64(0)), smaller_int(b, last, slots)


def _sum_of_products(b: ir.IRBuilder, *pairs: tuple[Any, Any]) -> Any:
    total = I64(0)
    for x, y in pairs:
        total = b.add(total, b.mul(x, y))
    return total


class PartWriter:
    """Writes the code of a part: gathers a block of entries, then each tile of rows attends."""

    def __init__(self, b: ir.IRBuilder, a: dict[str, Any], part: Any, *, dim: int, capped: bool):
        self.b, self.a, self.dim, self.capped = b, a, dim, capped
        self.columns = columns_of(dim)
        self.block = LANES * self.columns
        self.tile = SUMS // self.columns
        self.quantized = "k_scale" in a
        self.converted = a["v"].type.pointee is not FLOAT
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
        if self.converted:
            self.values = self._array(FLOAT, self.block * dim)
        if self.quantized:
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
        first, last = range_of(b, a["bounds"], self.unit, a["S"])
        first = b.add(first, b.mul(self.range, a["range"]))
        last = smaller_int(b, last, b.add(first, a["range"]))
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
        own_to = smaller_int(b, own, b.add(own_from, I64(self.block)))
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
            p = b.sdiv(smaller_int(b, row, b.sub(self.rows, I64(1))), self.groups)
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
                larger_int(b, highest, q_pos),
                smaller_int(b, lowest, b.select(real, q_pos, never)),
            ]
        highest, lowest = after
        window = b.load(a["window"])
        return highest, larger_int(b, I32(0), b.add(b.sub(lowest, window), I32(1)))

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
        """The block's keys as [H, block], and its values, as float32.

        Meanwhile the block's values arrive, and the keys of the slots after it.
        """
        b, a = self.b, self.a
        stored = a["k"].type
        line = 64 // SIZES[stored.pointee]
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
        if self.converted:
            with loop(b, I64(0), count) as i:
                row = b.inttoptr(self._get(self.value_at, i), stored)
                scale = splat(b, self._get(self.value_scale, i)) if self.quantized else None
                place = b.gep(self.values, [b.mul(i, I64(self.dim))])
                with loop(b, I64(0), I64(self.dim), LANES) as h:
                    numbers = load_floats(b, row, h)
                    store(b, numbers if scale is None else b.fmul(numbers, scale), place, h)
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
