"""Products of a few rows with a large matrix on CPUs: the matrix is read once, also in eight bits.

A decoding step multiplies one row, or the few of a draft, with every weight of the model, so its
time is that of reading the weights. XLA's product on CPU packs or converts the matrix first, which
costs as much again. Here LLVM compiles a loop for a fixed number of rows, and XLA calls it through
its foreign function interface (https://openxla.org/xla/custom_call). The sum of a result is one
chain over the inputs that does not depend on the number of rows.

Letters: P rows, K inputs, N outputs.
"""

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import binding, ir

from lookahead_jax.kernels.dispatch import target_platform

MAX_ROWS = {"float32": 8, "int8": 16}  # with more, arithmetic takes the time, and XLA is as fast
LANES = 16  # float32 numbers of a vector; LLVM splits it where registers are shorter
INPUTS_PER_PASS = 8  # rows of a [K, N] matrix that one pass over the results reads
OUTPUTS_PER_PASS = 2  # rows of an [N, K] matrix that one pass over the inputs reads
ROWS_PER_PASS = 8  # of the P rows, where each has sums in registers
WAKING_US = 200.0  # a product that takes less is done before other threads have woken up

_I32, _I64, _FLOAT, _BYTES = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.IntType(8)
_POINTER = _BYTES.as_pointer()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)
_STORED = {jnp.dtype("float32"): _FLOAT, jnp.dtype("int8"): _BYTES}


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
        and _layout_is_known()
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def multiply_few_rows(x: jax.Array, matrix: jax.Array, transposed: bool = False) -> jax.Array:
    """float32 `x` [P, K] times a float32 or int8 matrix [K, N], or `transposed` [N, K]: [P, N].

    For CPUs, and for shapes that `takes` accepts. Differentiable in both.
    """
    cores = _cores() if _microseconds(x.shape[0], matrix) > WAKING_US else 1
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


def _cores() -> int:
    """Threads of a product: more than eight are no faster, since all read the same memory."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 8)


@functools.cache
def _layout_is_known() -> bool:
    """Whether XLA calls functions as `_handler` reads it: major version 0 of the interface."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    found = re.search(r"#define XLA_FFI_API_MAJOR (\d+)", header.read_text("utf-8"))
    return found is not None and found[1] == "0"


_compiled: list[Any] = []  # machine code that XLA may call as long as the process lives


@functools.cache
def _register(rows: int, dtype: Any, transposed: bool, cores: int) -> str:
    """Compiles a product and makes it known to XLA; the name of the target."""
    kind = "transposed" if transposed else "plain"
    name = f"lookahead_few_rows_{kind}_{rows}_{dtype}_{cores}"
    module = ir.Module(name)
    loops = _transposed_loops if transposed else _plain_loops
    product = loops(module, rows, _STORED[dtype])
    # More parts than cores, because threads begin at different times. The rows of a [K, N] matrix
    # are cut by its parts, so these are few.
    parts = cores * (8 if transposed else 2) if cores > 1 else 1
    work = _work(module, product, parts, OUTPUTS_PER_PASS if transposed else LANES)
    _handler(module, name, work, parts, cores, outputs_axis=0 if transposed else 1)
    engine = _machine_code(module)
    _compiled.append(engine)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new_capsule(engine.get_function_address(name), None, None)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return name


def _machine_code(module: ir.Module) -> Any:
    """The module, optimised for the processor at hand."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        # Wide vectors pay here, where nearly all instructions are products and sums of them.
        features=binding.get_host_cpu_features().flatten() + ",-prefer-256-bit",
        opt=3,
    )
    parsed = binding.parse_assembly(str(module))
    options = binding.create_pipeline_tuning_options(speed_level=3)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


def _product_function(module: ir.Module, stored: ir.Type) -> tuple[ir.Function, ir.IRBuilder]:
    """`void product(x, matrix, y, K, N, first, last)`: the outputs `first` to `last` of all rows.

    x is [P, K] and y is [P, N].
    """
    pointers = [_FLOAT.as_pointer(), stored.as_pointer(), _FLOAT.as_pointer()]
    kind = ir.FunctionType(ir.VoidType(), [*pointers, _I64, _I64, _I64, _I64])
    function = ir.Function(module, kind, "product")
    function.linkage = "internal"
    for pointer in function.args[:3]:
        pointer.add_attribute("noalias")
    return function, ir.IRBuilder(function.append_basic_block())


def _plain_loops(module: ir.Module, rows: int, stored: ir.Type) -> ir.Function:
    """x [P, K] times [K, N]: results stay in the first caches, the matrix streams past them."""
    function, b = _product_function(module, stored)
    x, matrix, y, inputs, outputs, first, last = function.args
    fma, prefetch = _fma(module), _prefetch(module)
    with _loop(b, first, last, LANES) as n:
        for p in range(rows):
            _store(b, _ZEROS, y, _index(b, p, outputs, n))
    passed = range(INPUTS_PER_PASS)
    with _loop(b, _I64(0), inputs, INPUTS_PER_PASS) as k:
        factors = [
            [_splat(b, b.load(b.gep(x, [_index(b, p, inputs, b.add(k, _I64(i)))]))) for i in passed]
            for p in range(rows)
        ]
        starts = [b.mul(b.add(k, _I64(i)), outputs) for i in passed]
        ahead = b.mul(_I64(INPUTS_PER_PASS), outputs)
        with _loop(b, first, last, LANES) as n:
            places = [_index(b, p, outputs, n) for p in range(rows)]
            sums = [_load(b, y, place) for place in places]
            for start in starts:  # those of the next pass
                place = b.gep(matrix, [b.add(b.add(start, n), ahead)])
                b.call(prefetch, [b.bitcast(place, _POINTER), _I32(0), _I32(1), _I32(1)])
            for i in passed:
                weights = _load_weights(b, matrix, b.add(starts[i], n))
                sums = [b.call(fma, [factors[p][i], weights, sums[p]]) for p in range(rows)]
            for place, total in zip(places, sums, strict=True):
                _store(b, total, y, place)
    b.ret_void()
    return function


def _transposed_loops(module: ir.Module, rows: int, stored: ir.Type) -> ir.Function:
    """x [P, K] times [N, K] transposed: dot products with a few outputs' weights at a time."""
    function, b = _product_function(module, stored)
    x, matrix, y, inputs, outputs, first, last = function.args
    fma = _fma(module)
    some = range(OUTPUTS_PER_PASS)
    with _loop(b, first, last, OUTPUTS_PER_PASS) as n:
        for lowest in range(0, rows, ROWS_PER_PASS):
            chosen = range(lowest, min(rows, lowest + ROWS_PER_PASS))
            before, body = b.block, b.append_basic_block()
            after = b.append_basic_block()
            b.branch(body)
            b.position_at_end(body)
            k = b.phi(_I64)
            k.add_incoming(_I64(0), before)
            sums = {(p, u): b.phi(_VECTOR) for p in chosen for u in some}
            for total in sums.values():
                total.add_incoming(_ZEROS, before)
            weights = [
                _load_weights(b, matrix, b.add(b.mul(b.add(n, _I64(u)), inputs), k)) for u in some
            ]
            values = {p: _load(b, x, _index(b, p, inputs, k)) for p in chosen}
            new = {(p, u): b.call(fma, [values[p], weights[u], sums[p, u]]) for p, u in sums}
            following = b.add(k, _I64(LANES))
            k.add_incoming(following, body)
            for key, total in sums.items():
                total.add_incoming(new[key], body)
            b.cbranch(b.icmp_signed("<", following, inputs), body, after)
            b.position_at_end(after)
            for (p, u), total in new.items():
                result = _add_lanes(b, total)
                place = _index(b, p, outputs, b.add(n, _I64(u)))
                b.store(result, b.gep(y, [place]))
    b.ret_void()
    return function


# What the threads of a product share, as i64: the next part, finished parts, and threads that may
# still look here; then the addresses of x, the matrix and y, and the sizes K and N.
_NEXT, _FINISHED, _USERS, _ARGUMENTS, _SHARED = 0, 1, 2, 3, 8


def _work(module: ir.Module, product: ir.Function, parts: int, unit: int) -> ir.Function:
    """`void work(i64* shared)`: takes parts until none is left, then leaves; the last one frees."""
    work = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), "work")
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), "free")
    b = ir.IRBuilder(work.append_basic_block())
    shared = b.bitcast(work.args[0], _I64.as_pointer())
    pointers = product.args[:3]
    arguments = [b.load(b.gep(shared, [_I64(_ARGUMENTS + i)])) for i in range(5)]
    addresses = [b.inttoptr(value, to.type) for value, to in zip(arguments, pointers, strict=False)]
    units = b.sdiv(arguments[4], _I64(unit))
    take, run, leave = (b.append_basic_block() for _ in range(3))
    b.branch(take)
    b.position_at_end(take)
    part = b.atomic_rmw("add", b.gep(shared, [_I64(_NEXT)]), _I64(1), "monotonic")
    b.cbranch(b.icmp_signed("<", part, _I64(parts)), run, leave)
    b.position_at_end(run)
    first, last = (
        b.mul(b.sdiv(b.mul(units, n), _I64(parts)), _I64(unit))
        for n in (part, b.add(part, _I64(1)))
    )
    b.call(product, [*addresses, *arguments[3:], first, last])
    b.atomic_rmw("add", b.gep(shared, [_I64(_FINISHED)]), _I64(1), "release")
    b.branch(take)
    b.position_at_end(leave)
    users = b.atomic_rmw("sub", b.gep(shared, [_I64(_USERS)]), _I64(1), "acq_rel")
    with b.if_then(b.icmp_signed("==", users, _I64(1))):
        b.call(free, [work.args[0]])
    b.ret_void()
    return work


def _handler(
    module: ir.Module, name: str, work: ir.Function, parts: int, cores: int, *, outputs_axis: int
) -> None:
    """`XLA_FFI_Error* name(XLA_FFI_CallFrame*)` with the offsets of xla/ffi/api/c_api.h.

    XLA asks once for metadata, the version of the interface, then calls it with buffers. Threads of
    XLA's pool help; if they are busy, this one does all the parts.
    """
    handler = ir.Function(module, ir.FunctionType(_POINTER, [_POINTER]), name)
    malloc = ir.Function(module, ir.FunctionType(_POINTER, [_I64]), "malloc")
    b, frame = ir.IRBuilder(handler.append_basic_block()), handler.args[0]
    null = ir.Constant(_POINTER, None)

    def place(base: Any, offset: int, kind: ir.Type) -> Any:
        return b.bitcast(b.gep(base, [_I64(offset)]), kind.as_pointer())

    def read(base: Any, offset: int, kind: ir.Type) -> Any:
        return b.load(place(base, offset, kind))

    extension, api = read(frame, 8, _POINTER), read(frame, 16, _POINTER)
    with b.if_then(b.icmp_unsigned("!=", extension, null)):
        is_metadata = b.icmp_signed("==", read(extension, 8, _I32), _I32(1))
        with b.if_then(is_metadata):
            metadata = read(extension, 24, _POINTER)
            for offset, of_api in ((24, 32), (28, 36)):  # the version, major and minor
                b.store(read(api, of_api, _I32), place(metadata, offset, _I32))
            b.store(_I32(0), place(metadata, 32, _I32))  # no traits
            b.ret(null)

    arguments = read(frame, 72, _POINTER.as_pointer())
    results = read(frame, 112, _POINTER.as_pointer())
    x, matrix = (b.load(b.gep(arguments, [_I64(i)])) for i in range(2))
    y = b.load(results)

    def dimension(buffer: Any, axis: int) -> Any:
        return b.load(b.gep(read(buffer, 40, _I64.as_pointer()), [_I64(axis)]))

    shared = b.call(malloc, [_I64(8 * _SHARED)])
    addresses = [b.ptrtoint(read(buffer, 24, _POINTER), _I64) for buffer in (x, matrix, y)]
    values = [
        _I64(0), _I64(0), _I64(cores + 1), *addresses, dimension(x, 1),
        dimension(matrix, outputs_axis),
    ]  # fmt: skip
    for i, value in enumerate(values):
        b.store(value, place(shared, 8 * i, _I64))

    def leave() -> None:
        b.atomic_rmw("sub", place(shared, 8 * _USERS, _I64), _I64(1), "acq_rel")

    call = ir.FunctionType(_POINTER, [_POINTER])
    schedule, destroy = (read(api, offset, call.as_pointer()) for offset in (136, 64))
    request = b.alloca(_BYTES, _I64(40))
    context = read(frame, 24, _POINTER)
    fields = (null, context, b.bitcast(work, _POINTER), shared)
    for _ in range(cores - 1):  # XLA_FFI_ThreadPool_Schedule
        b.store(_I64(40), place(request, 0, _I64))
        for i, field in enumerate(fields, start=1):
            b.store(field, place(request, 8 * i, _POINTER))
        error = b.call(schedule, [request])
        with b.if_then(b.icmp_unsigned("!=", error, null)):  # there is no pool
            leave()
            b.store(_I64(24), place(request, 0, _I64))  # XLA_FFI_Error_Destroy
            b.store(error, place(request, 16, _POINTER))
            b.call(destroy, [request])
    b.call(work, [shared])
    waiting, done = b.append_basic_block(), b.append_basic_block()
    b.branch(waiting)
    b.position_at_end(waiting)
    if cores > 1 and hasattr(os, "sched_getaffinity"):  # Linux, where libc has it
        b.call(ir.Function(module, ir.FunctionType(_I32, []), "sched_yield"), [])
    finished = b.load_atomic(place(shared, 8 * _FINISHED, _I64), "acquire", 8)
    b.cbranch(b.icmp_signed("<", finished, _I64(parts)), waiting, done)
    b.position_at_end(done)
    users = b.atomic_rmw("sub", place(shared, 8 * _USERS, _I64), _I64(1), "acq_rel")
    with b.if_then(b.icmp_signed("==", users, _I64(1))):
        b.call(module.globals["free"], [shared])
    b.ret(null)


@contextlib.contextmanager
def _loop(b: ir.IRBuilder, start: Any, stop: Any, step: int) -> Iterator[Any]:
    """`for (i = start; i < stop; i += step)`."""
    before, body, after = b.block, b.append_basic_block(), b.append_basic_block()
    b.cbranch(b.icmp_signed("<", start, stop), body, after)
    b.position_at_end(body)
    index = b.phi(_I64)
    index.add_incoming(start, before)
    yield index
    following = b.add(index, _I64(step))
    index.add_incoming(following, b.block)
    b.cbranch(b.icmp_signed("<", following, stop), body, after)
    b.position_at_end(after)


def _index(b: ir.IRBuilder, row: int, width: Any, column: Any) -> Any:
    return b.add(b.mul(_I64(row), width), column)


def _load(b: ir.IRBuilder, base: Any, index: Any) -> Any:
    return b.load(b.bitcast(b.gep(base, [index]), _VECTOR.as_pointer()), align=4)


def _store(b: ir.IRBuilder, value: Any, base: Any, index: Any) -> None:
    b.store(value, b.bitcast(b.gep(base, [index]), _VECTOR.as_pointer()), align=4)


def _load_weights(b: ir.IRBuilder, matrix: Any, index: Any) -> Any:
    """A vector of float32 weights, converted if they are int8."""
    stored = matrix.type.pointee
    vector = b.bitcast(b.gep(matrix, [index]), ir.VectorType(stored, LANES).as_pointer())
    if stored is _FLOAT:
        return b.load(vector, align=4)
    return b.sitofp(b.sext(b.load(vector, align=1), ir.VectorType(_I32, LANES)), _VECTOR)


def _splat(b: ir.IRBuilder, number: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = b.insert_element(undefined, number, _I32(0))
    everywhere = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return b.shuffle_vector(first, undefined, everywhere)


def _fma(module: ir.Module) -> ir.Function:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return ir.Function(module, kind, f"llvm.fma.v{LANES}f32")


def _add_lanes(b: ir.IRBuilder, vector: Any) -> Any:
    """The sum of a vector's numbers: its halves are added until one is left, in this order."""
    half = LANES // 2
    while half:
        low, high = (
            b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, half), places))
            for places in (list(range(half)), list(range(half, 2 * half)))
        )
        vector, half = b.fadd(low, high), half // 2
    return b.extract_element(vector, _I32(0))


def _prefetch(module: ir.Module) -> ir.Function:
    kind = ir.FunctionType(ir.VoidType(), [_POINTER, _I32, _I32, _I32])
    return ir.Function(module, kind, "llvm.prefetch.p0")
