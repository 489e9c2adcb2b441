"""Pieces of LLVM code that the kernels for CPUs share: loops, vectors of floats, e^x and tanh."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

LANES = 16  # float32 numbers of a vector; LLVM splits it where registers are shorter
I32, I64, FLOAT, BYTES = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.IntType(8)
BFLOATS = ir.IntType(16)  # bfloat16: the upper half of a float32
STORED = {"float32": FLOAT, "bfloat16": BFLOATS, "int8": BYTES}  # what `load_floats` reads, by name
SIZES = {FLOAT: 4, BFLOATS: 2, BYTES: 1}  # bytes of a stored number
POINTER = BYTES.as_pointer()
VECTOR = ir.VectorType(FLOAT, LANES)
INTEGERS = ir.VectorType(I32, LANES)
ZEROS = ir.Constant(VECTOR, [0.0] * LANES)


@contextlib.contextmanager
def loop(b: ir.IRBuilder, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
    """`for (i = start; i < stop; i += step)`."""
    with carried(b, start, stop, step, []) as (index, _, _):
        yield index


@contextlib.contextmanager
def carried(
    b: ir.IRBuilder, start: Any, stop: Any, step: int, values: Sequence[Any]
) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """`loop` that carries values: yields the index, the values, and a list for their next ones.

    After the loop that list holds the last values.
    """
    before, body, after = b.block, b.append_basic_block(), b.append_basic_block()
    b.cbranch(b.icmp_signed("<", start, stop), body, after)
    b.position_at_end(body)
    index = b.phi(I64)
    index.add_incoming(start, before)
    now = [b.phi(value.type) for value in values]
    for phi, value in zip(now, values, strict=True):
        phi.add_incoming(value, before)
    following: list[Any] = []
    yield index, now, following
    for phi, value in zip(now, following, strict=True):
        phi.add_incoming(value, b.block)
    next_index = b.add(index, I64(step))
    index.add_incoming(next_index, b.block)
    end = b.block
    b.cbranch(b.icmp_signed("<", next_index, stop), body, after)
    b.position_at_end(after)
    for i, value in enumerate(values):
        last = b.phi(value.type)
        last.add_incoming(value, before)
        last.add_incoming(following[i], end)
        following[i] = last


def load(b: ir.IRBuilder, base: Any, index: Any, kind: ir.Type = VECTOR) -> Any:
    """A vector from any place of an array of its elements."""
    return b.load(b.bitcast(b.gep(base, [index]), kind.as_pointer()), align=1)


def store(b: ir.IRBuilder, value: Any, base: Any, index: Any) -> None:
    b.store(value, b.bitcast(b.gep(base, [index]), value.type.as_pointer()), align=1)


def load_floats(b: ir.IRBuilder, base: Any, index: Any) -> Any:
    """A vector of floats from an array of float32, or of bfloat16 or int8, which are converted."""
    stored = base.type.pointee
    if stored is FLOAT:
        return load(b, base, index)
    numbers = load(b, base, index, ir.VectorType(stored, LANES))
    if stored is BFLOATS:
        shift = ir.Constant(INTEGERS, [16] * LANES)
        return b.bitcast(b.shl(b.zext(numbers, INTEGERS), shift), VECTOR)
    return b.sitofp(b.sext(numbers, INTEGERS), VECTOR)


def splat(b: ir.IRBuilder, number: Any) -> Any:
    """A vector with one number, a float or an i32, everywhere."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = b.insert_element(undefined, number, I32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(INTEGERS, [0] * LANES))


def intrinsic(module: ir.Module, name: str, result: ir.Type, arguments: list[ir.Type]) -> Any:
    """LLVM's function of that name."""
    if name in module.globals:
        return module.globals[name]
    return ir.Function(module, ir.FunctionType(result, arguments), name)


def fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of vectors, rounded once."""
    function = intrinsic(b.module, f"llvm.fma.v{LANES}f32", VECTOR, [VECTOR] * 3)
    return b.call(function, [x, y, z])


def prefetch(b: ir.IRBuilder, place: Any) -> None:
    """Asks for the memory at an address, into the second cache."""
    kinds: list[ir.Type] = [POINTER, I32, I32, I32]
    function = intrinsic(b.module, "llvm.prefetch.p0", ir.VoidType(), kinds)
    b.call(function, [b.bitcast(place, POINTER), I32(0), I32(1), I32(1)])


def add_lanes(b: ir.IRBuilder, vector: Any) -> Any:
    """The sum of a vector's numbers: its halves are added until one is left, in this order."""
    return _halved(b, vector, b.fadd)


def max_lanes(b: ir.IRBuilder, vector: Any) -> Any:
    """The largest of a vector's numbers; NaN beside numbers may be left out."""
    return _halved(b, vector, lambda x, y: larger(b, x, y))


def _halved(b: ir.IRBuilder, vector: Any, join: Any) -> Any:
    half = LANES // 2
    while half:
        low, high = (
            b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, half), places))
            for places in (list(range(half)), list(range(half, 2 * half)))
        )
        vector, half = join(low, high), half // 2
    return b.extract_element(vector, I32(0))


def larger(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """The larger of two floats or vectors; y if one is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def larger_int(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed(">", x, y), x, y)


def smaller_int(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed("<", x, y), x, y)


def floats(number: float) -> Any:
    """A constant vector, of a number rounded to float32."""
    return ir.Constant(VECTOR, [number] * LANES)


def exp(b: ir.IRBuilder, x: Any) -> Any:
    """e^x of a vector of numbers up to 88, to 2 units in the last place; 0 below -87; NaN of NaN.

    e^x = 2^n e^r with |r| < ln(2) / 2; the polynomial is that of Cephes' expf.
    """
    lowest = floats(-87.0)
    tiny = b.fcmp_ordered("<", x, lowest)
    x = b.select(tiny, lowest, x)
    rounder = floats(1.5 * 2**23)  # added to a small number, it leaves the nearest integer
    shifted = fma(b, x, floats(1 / math.log(2)), rounder)
    n = b.fsub(shifted, rounder)
    r = fma(b, n, floats(-0.693359375), x)
    r = fma(b, n, floats(2.12194440e-4), r)
    total = floats(1.9875691500e-4)
    for factor in (
        1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
    ):  # fmt: skip
        total = fma(b, total, r, floats(factor))
    total = b.fadd(fma(b, total, b.fmul(r, r), r), floats(1.0))
    exponent = b.shl(b.bitcast(shifted, INTEGERS), ir.Constant(INTEGERS, [23] * LANES))
    one = ir.Constant(INTEGERS, [0x3F800000] * LANES)  # the bits of 1.0
    return b.select(tiny, ZEROS, b.fmul(total, b.bitcast(b.add(exponent, one), VECTOR)))


def tanh(b: ir.IRBuilder, x: Any) -> Any:
    """tanh of a vector, to some units in the last place: Eigen's rational function."""
    limit = floats(7.90531110763549805)
    x = b.select(b.fcmp_ordered(">", x, limit), limit, x)
    x = b.select(b.fcmp_ordered("<", x, b.fneg(limit)), b.fneg(limit), x)
    square = b.fmul(x, x)

    def polynomial(first: float, *others: float) -> Any:
        total = floats(first)
        for factor in others:
            total = fma(b, total, square, floats(factor))
        return total

    above = polynomial(
        -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
        1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
    )  # fmt: skip
    below = polynomial(
        1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03
    )
    return b.fdiv(b.fmul(x, above), below)


def transposed(b: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 numbers as their columns, by swapping blocks of 8, 4, 2 and 1."""
    rows, width = list(rows), LANES // 2
    while width:
        low = [i if not i & width else LANES + i - width for i in range(LANES)]
        high = [i + width if not i & width else LANES + i for i in range(LANES)]
        for i in range(LANES):
            if not i & width:
                pair = rows[i], rows[i + width]
                rows[i], rows[i + width] = (
                    b.shuffle_vector(*pair, ir.Constant(INTEGERS, places)) for places in (low, high)
                )
        width //= 2
    return rows
