"""Products of a few rows with a large matrix on CPUs: the matrix is read once, also in eight bits.

A decoding step multiplies one row, or the few of a draft, with every weight of the model, so its
time is that of reading the weights. XLA's product on CPU packs or converts the matrix first, which
costs as much again. Here LLVM compiles a loop for a fixed number of rows, and XLA calls it
(cpu_calls.py). The sum of a result is one chain over the inputs that does not depend on the number
of rows.

Letters: P rows, K inputs, N outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir

from lookahead_jax.kernels.cpu_calls import (
    cores_to_use,
    layout_is_known,
    made_once,
    register_product,
)
from lookahead_jax.kernels.cpu_code import (
    BYTES,
    FLOAT,
    I64,
    LANES,
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

MAX_ROWS = {"float32": 8, "int8": 16}  # with more, arithmetic takes the time, and XLA is as fast
INPUTS_PER_PASS = 8  # rows of a [K, N] matrix that one pass over the results reads
OUTPUTS_PER_PASS = 2  # rows of an [N, K] matrix that one pass over the inputs reads
ROWS_PER_PASS = 8  # of the P rows, where each has sums in registers
WAKING_US = 200.0  # a product that takes less is done before other threads have woken up

_STORED = {jnp.dtype("float32"): FLOAT, jnp.dtype("int8"): BYTES}


def takes(rows: int, x: jax.Array, matrix: jax.Array, *, transposed: bool = False) -> bool:
    """Whether `multiply_few_rows` can take this number of rows of x and a [K, N] matrix.

    It cannot be split over devices, so under a mesh XLA's product runs.
    """
    inputs, outputs = matrix.shape[::-1] if transposed else matrix.shape
    whole = (
        inputs % LANES == 0 == outputs % OUTPUTS_PER_PASS
        if transposed
        else inputs % INPUTS_PER_PASS == 0 == outputs % LANES
    )
    return (
        target_platform() == "cpu"
        and whole
        and x.dtype == jnp.float32
        and 1 <= rows <= MAX_ROWS.get(matrix.dtype.name, 0)
        and jax.sharding.get_abstract_mesh().empty
        and layout_is_known()
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def multiply_few_rows(x: jax.Array, matrix: jax.Array, transposed: bool = False) -> jax.Array:
    """float32 `x` [P, K] times a float32 or int8 matrix [K, N], or `transposed` [N, K]: [P, N].

    For CPUs, and for shapes that `takes` accepts. Differentiable in both.
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
        total = total + jax.lax.dot_general(x, dmatrix, axes)
    return multiply_few_rows(x, matrix, transposed), total


def _microseconds(rows: int, matrix: jax.Array) -> float:
    """About what a product takes on one core of 10 GB/s and 60 GFLOP/s."""
    return max(matrix.nbytes / 1e4, 2 * rows * matrix.size / 6e4)


@made_once
def _register(rows: int, dtype: Any, transposed: bool, cores: int) -> str:
    """Compiles a product and makes it known to XLA; the name of the target."""
    kind = "transposed" if transposed else "plain"
    module = ir.Module(f"lookahead_few_rows_{kind}_{rows}_{dtype}_{cores}")
    if transposed:
        product, unit, parts = _transposed_loops(module, rows, _STORED[dtype]), OUTPUTS_PER_PASS, 8
    else:  # the rows of the matrix are cut by the parts, so these are few
        product, unit, parts = _plain_loops(module, rows, _STORED[dtype]), LANES, 2
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
    """x [P, K] times [K, N]: results stay in the first caches, the matrix streams past them."""
    function, b = _product_function(module, stored)
    x, matrix, y, inputs, outputs, first, last = function.args
    with loop(b, first, last, LANES) as n:
        for p in range(rows):
            store(b, ZEROS, y, _index(b, p, outputs, n))
    passed = range(INPUTS_PER_PASS)
    with loop(b, I64(0), inputs, INPUTS_PER_PASS) as k:
        factors = [
            [splat(b, b.load(b.gep(x, [_index(b, p, inputs, b.add(k, I64(i)))]))) for i in passed]
            for p in range(rows)
        ]
        starts = [b.mul(b.add(k, I64(i)), outputs) for i in passed]
        ahead = b.mul(I64(INPUTS_PER_PASS), outputs)
        with loop(b, first, last, LANES) as n:
            places = [_index(b, p, outputs, n) for p in range(rows)]
            sums = [load(b, y, place) for place in places]
            for start in starts:  # those of the next pass
                prefetch(b, b.gep(matrix, [b.add(b.add(start, n), ahead)]))
            for i in passed:
                weights = load_floats(b, matrix, b.add(starts[i], n))
                sums = [fma(b, factors[p][i], weights, sums[p]) for p in range(rows)]
            for place, total in zip(places, sums, strict=True):
                store(b, total, y, place)
    b.ret_void()
    return function


def _transposed_loops(module: ir.Module, rows: int, stored: ir.Type) -> ir.Function:
    """x [P, K] times [N, K] transposed: dot products with a few outputs' weights at a time."""
    function, b = _product_function(module, stored)
    x, matrix, y, inputs, outputs, first, last = function.args
    some = range(OUTPUTS_PER_PASS)
    with loop(b, first, last, OUTPUTS_PER_PASS) as n:
        for lowest in range(0, rows, ROWS_PER_PASS):
            chosen = range(lowest, min(rows, lowest + ROWS_PER_PASS))
            pairs = [(p, u) for p in chosen for u in some]
            zeros = [ZEROS] * len(pairs)
            with carried(b, I64(0), inputs, LANES, zeros) as (k, sums, totals):
                weights = [
                    load_floats(b, matrix, b.add(b.mul(b.add(n, I64(u)), inputs), k)) for u in some
                ]
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
