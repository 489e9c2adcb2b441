"""Products of a few rows with a large matrix on CPUs: the matrix is read once, also in eight bits.

A decoding step multiplies one row, or the few of a draft, with every weight of the model, so its
time is that of reading the weights. XLA's product on CPU packs or converts the matrix first, which
costs as much again. Here LLVM compiles a loop for a fixed number of rows, and XLA calls it
(cpu_calls.py). The order in which a result is summed does not depend on the number of rows.

Letters: P rows, K inputs, N outputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from llvmlite import ir

from lookahead_jax.kernels.cpu_calls import (
    cores_to_use,
    layout_is_known,
    made_once,
    register_product,
    vector_registers,
)
from lookahead_jax.kernels.cpu_code import (
    FLOAT,
    I64,
    LANES,
    STORED,
    VECTOR,
    ZEROS,
    add_lanes,
    carried,
    fma,
    load,
    load_floats,
    loop,
    prefetch,
    splat,
    store,
)
from lookahead_jax.kernels.dispatch import target_platform

OUTPUTS_PER_PASS = 2  # rows of an [N, K] matrix that one pass over the inputs reads
ROWS_PER_PASS = 8  # of the P rows, where each has sums in registers
WIDEST = 6  # vectors of outputs of a tile
TILE_INPUTS = 64  # inputs of a tile: it fits into the first cache
WAKING_US = 200.0  # a product that takes less is done before other threads have woken up


class _Limits(NamedTuple):
    """What pays on a processor."""

    sums: int  # vectors of sums in registers
    plain: dict[str, int]  # most rows by the type of a [K, N] matrix: with more, XLA is as fast
    transposed: dict[str, int]  # the same for [N, K]


@functools.cache
def limits() -> _Limits:
    """Those of this machine: of AVX-512 they were measured, others have fewer registers."""
    if vector_registers() >= 32:
        plain = {"float32": 64, "bfloat16": 16, "int8": 64}
        return _Limits(24, plain, {"float32": 32, "bfloat16": 16, "int8": 64})
    few = {"float32": 8, "bfloat16": 8, "int8": 16}
    return _Limits(6, few, few)


def takes(rows: int, x: jax.Array, matrix: jax.Array, *, transposed: bool = False) -> bool:
    """Whether `multiply_few_rows` can take this number of rows of x and a [K, N] matrix.

    It cannot be split over devices, so under a mesh XLA's product runs.
    """
    most = limits().transposed if transposed else limits().plain
    # Whole vectors of an [N, K] matrix are of inputs, of a [K, N] matrix of outputs.
    whole = matrix.shape[1] % LANES == 0
    if transposed:
        whole &= matrix.shape[0] % OUTPUTS_PER_PASS == 0
    return (
        target_platform() == "cpu"
        and whole
        and matrix.size > 0
        and x.dtype in (jnp.float32, jnp.bfloat16)
        and matrix.dtype in (x.dtype, jnp.int8)
        and 1 <= rows <= most.get(matrix.dtype.name, 0)
        and jax.sharding.get_abstract_mesh().empty
        and layout_is_known()
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def multiply_few_rows(x: jax.Array, matrix: jax.Array, transposed: bool = False) -> jax.Array:
    """float32 `x` [P, K] times a matrix [K, N], or `transposed` [N, K]: float32 [P, N].

    The matrix is of float32, bfloat16 or int8. For CPUs, and for shapes that `takes` accepts.
    Differentiable in both.
    """
    cores = cores_to_use() if _microseconds(x.shape[0], matrix) > WAKING_US else 1
    name = _register(x.shape[0], matrix.dtype, transposed, cores)
    shape = jax.ShapeDtypeStruct((x.shape[0], matrix.shape[0 if transposed else 1]), jnp.float32)
    return jax.ffi.ffi_call(name, shape, vmap_method="sequential")(x, matrix)


@functools.partial(multiply_few_rows.defjvp, symbolic_zeros=True)
def _derivative(transposed: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, matrix), (dx, dmatrix) = primals, tangents
    axes = (((1,), (1 if transposed else 0,)), ((), ()))
    total = jnp.zeros((x.shape[0], matrix.shape[0 if transposed else 1]), jnp.float32)
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        total = total + jax.lax.dot_general(dx, matrix.astype(dx.dtype), axes)
    if not isinstance(dmatrix, jax.custom_derivatives.SymbolicZero):
        total = total + jax.lax.dot_general(x, dmatrix.astype(x.dtype), axes)
    return multiply_few_rows(x, matrix, transposed), total


def _microseconds(rows: int, matrix: jax.Array) -> float:
    """About what a product takes on one core of 10 GB/s and 100 GFLOP/s."""
    return max(matrix.nbytes / 1e4, 2 * rows * matrix.size / 1e5)


@made_once
def _register(rows: int, dtype: Any, transposed: bool, cores: int) -> str:
    """Compiles a product and makes it known to XLA; the name of the target."""
    kind, stored = "transposed" if transposed else "plain", STORED[dtype.name]
    module = ir.Module(f"lookahead_few_rows_{kind}_{rows}_{dtype}_{cores}")
    if transposed:
        product, unit, parts = _transposed_loops(module, rows, stored), OUTPUTS_PER_PASS, 8
    else:  # the rows of the matrix are cut by the parts, so these are few
        product, unit, parts = _plain_loops(module, rows, stored), LANES, 2
    register_product(product, cores=cores, parts=parts, unit=unit, outputs_axis=int(not transposed))
    return module.name


def _product_function(module: ir.Module, stored: ir.Type) -> tuple[ir.Function, ir.IRBuilder]:
    """`void product(x, matrix, y, K, N, first, last)`: the outputs `first` to `last` of all rows.

    x is [P, K] and y is [P, N].
    """
    pointers = [FLOAT.as_pointer(), stored.as_pointer(), FLOAT.as_pointer()]
    kind = ir.FunctionType(ir.VoidType(), [*pointers, I64, I64, I64, I64])
    function = ir.Function(module, kind, "product")
    function.linkage = "internal"
    for pointer in function.args[:3]:
        pointer.add_attribute("noalias")
    return function, ir.IRBuilder(function.append_basic_block())


def _plain_loops(module: ir.Module, rows: int, stored: ir.Type) -> ir.Function:
    """x [P, K] times [K, N], tile by tile of the matrix.

    While a tile is multiplied, with sums in registers, the next one comes into the second cache. A
    tile stays in the first cache for the groups of rows, which take turns.
    """
    function, b = _product_function(module, stored)
    inputs, outputs, first, last = function.args[3:]
    groups = _groups(rows)
    most = min(limits().sums // max(map(len, groups)), WIDEST) * LANES
    wide = b.sub(last, b.srem(b.sub(last, first), I64(most)))
    copy = b.alloca(VECTOR, I64(TILE_INPUTS * most // LANES)) if len(groups) > 1 else None
    with loop(b, I64(0), inputs, TILE_INPUTS) as k:
        below = b.add(k, I64(TILE_INPUTS))
        end = b.select(b.icmp_signed("<", below, inputs), below, inputs)
        to_below = b.mul(I64(TILE_INPUTS), outputs)
        for start, stop, width in ((first, wide, most), (wide, last, LANES)):
            with loop(b, start, stop, width) as n:
                is_last = b.icmp_signed(">=", b.add(n, I64(width)), last)
                to_next = b.select(is_last, b.sub(b.add(to_below, first), n), I64(width))
                for g, group in enumerate(groups):
                    vectors = width // LANES
                    asked = range(g, vectors, len(groups))  # a share for each group
                    tile = _Tile(k, end, n, vectors, to_next, asked, copy, written=g == 0)
                    _multiply_tile(b, function, group, tile)
    b.ret_void()
    return function


class _Tile(NamedTuple):
    """Some inputs and outputs of a [K, N] matrix."""

    first: Any  # input
    last: Any  # input, not included
    output: Any  # the first
    vectors: int  # of outputs
    to_next: Any  # numbers from here to the next tile
    asked: range  # its vectors to fetch meanwhile
    copy: Any  # where all its vectors stand together; None: nowhere
    written: bool  # now, instead of read


def _multiply_tile(b: ir.IRBuilder, function: ir.Function, group: range, tile: _Tile) -> None:
    """Adds to the results of a group of rows what a tile gives."""
    x, matrix, y, inputs, outputs = function.args[:5]
    some = range(tile.vectors)
    pairs = [(p, u) for p in group for u in some]
    places = [b.add(_index(b, p, outputs, tile.output), I64(u * LANES)) for p, u in pairs]
    begun = b.icmp_signed(">", tile.first, I64(0))
    sums = [b.select(begun, load(b, y, place), ZEROS) for place in places]
    with carried(b, tile.first, tile.last, 1, sums) as (k, sums, totals):
        start = b.add(b.mul(k, outputs), tile.output)
        starts = [b.add(start, I64(u * LANES)) for u in some]
        copies = b.mul(b.sub(k, tile.first), I64(tile.vectors))
        if tile.copy is None or tile.written:
            weights = [load_floats(b, matrix, start) for start in starts]
        else:
            weights = [b.load(b.gep(tile.copy, [b.add(copies, I64(u))])) for u in some]
        if tile.copy is not None and tile.written:
            for u in some:
                b.store(weights[u], b.gep(tile.copy, [b.add(copies, I64(u))]))
        for u in tile.asked:
            prefetch(b, b.gep(matrix, [b.add(starts[u], tile.to_next)]))
        factors = {p: splat(b, b.load(b.gep(x, [_index(b, p, inputs, k)]))) for p in group}
        totals += [
            fma(b, factors[p], weights[u], total) for (p, u), total in zip(pairs, sums, strict=True)
        ]
    for place, total in zip(places, totals, strict=True):
        store(b, total, y, place)


def _groups(rows: int) -> list[range]:
    """The rows in groups of nearly equal size, whose sums fit into registers."""
    count = -(-rows // min(ROWS_PER_PASS, limits().sums))
    return [range(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _transposed_loops(module: ir.Module, rows: int, stored: ir.Type) -> ir.Function:
    """x [P, K] times [N, K] transposed: dot products with a few outputs' weights at a time."""
    function, b = _product_function(module, stored)
    x, matrix, y, inputs, outputs, first, last = function.args
    some = range(OUTPUTS_PER_PASS)
    ahead = b.mul(inputs, I64(OUTPUTS_PER_PASS))
    with loop(b, first, last, OUTPUTS_PER_PASS) as n:
        for chosen in _groups(rows):
            pairs = [(p, u) for p in chosen for u in some]
            zeros = [ZEROS] * len(pairs)
            with carried(b, I64(0), inputs, LANES, zeros) as (k, sums, totals):
                starts = [b.add(b.mul(b.add(n, I64(u)), inputs), k) for u in some]
                weights = [load_floats(b, matrix, start) for start in starts]
                if chosen.start == 0:  # those of the next outputs
                    for start in starts:
                        prefetch(b, b.gep(matrix, [b.add(start, ahead)]))
                values = {p: load(b, x, _index(b, p, inputs, k)) for p in chosen}
                totals += [
                    fma(b, values[p], weights[u], total)
                    for (p, u), total in zip(pairs, sums, strict=True)
                ]
            for (p, u), total in zip(pairs, totals, strict=True):
                result = add_lanes(b, total)
                place = _index(b, p, outputs, b.add(n, I64(u)))
                b.store(result, b.gep(y, [place]))
    b.ret_void()
    return function


def _index(b: ir.IRBuilder, row: int, width: Any, column: Any) -> Any:
    return b.add(b.mul(I64(row), width), column)
