"""Functions made of LLVM's code as XLA calls them on CPUs, with the threads of XLA's pool.

XLA's foreign function interface (https://openxla.org/xla/custom_call) hands a call frame to a
function of C. Its layout is that of xla/ffi/api/c_api.h, which comes with jaxlib.
"""

import ctypes
import functools
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
from llvmlite import binding, ir

_I32, _I64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8)
_POINTER = _BYTES.as_pointer()


@functools.cache
def layout_is_known() -> bool:
    """Whether XLA calls functions as `_handler` reads it: major version 0 of the interface."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return False
    found = re.search(r"#define XLA_FFI_API_MAJOR (\d+)", header.read_text("utf-8"))
    return found is not None and found[1] == "0"


_compiled: list[Any] = []  # machine code that XLA may call as long as the process lives


def register_product(
    product: ir.Function, *, cores: int, parts: int, unit: int, outputs_axis: int
) -> None:
    """Makes a product known to XLA as a target with the name of its module.

    `product(x, matrix, y, K, N, first, last)` computes the outputs `first` to `last`, multiples of
    `unit`, of x [P, K] times a matrix with N outputs on its axis `outputs_axis`. `cores` threads
    take `parts` parts each, because they begin at different times.
    """
    module = product.module
    total = cores * parts if cores > 1 else 1
    work = _work(module, product, total, unit)
    _handler(module, work, total, cores, outputs_axis=outputs_axis)
    register_handler(module)


def register_handler(module: ir.Module) -> None:
    """Makes the function of a module that has its name known to XLA as a target of that name."""
    engine = _machine_code(module)
    _compiled.append(engine)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new_capsule(engine.get_function_address(module.name), None, None)
    jax.ffi.register_ffi_target(module.name, capsule, platform="cpu")


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


def begin_handler(module: ir.Module) -> tuple[ir.IRBuilder, Any, Any, Any]:
    """`XLA_FFI_Error* handler(XLA_FFI_CallFrame*)`, named as the module, up to where it is called.

    XLA asks once for metadata, the version of the interface, then calls it with buffers. Returns
    the builder, the frame, and the arrays of pointers to the buffers of arguments and results.
    """
    handler = ir.Function(module, ir.FunctionType(_POINTER, [_POINTER]), module.name)
    b, frame = ir.IRBuilder(handler.append_basic_block()), handler.args[0]
    null = ir.Constant(_POINTER, None)
    extension, api = _read(b, frame, 8, _POINTER), _read(b, frame, 16, _POINTER)
    with b.if_then(b.icmp_unsigned("!=", extension, null)):
        is_metadata = b.icmp_signed("==", _read(b, extension, 8, _I32), _I32(1))
        with b.if_then(is_metadata):
            metadata = _read(b, extension, 24, _POINTER)
            for offset, of_api in ((24, 32), (28, 36)):  # the version, major and minor
                b.store(_read(b, api, of_api, _I32), _place(b, metadata, offset, _I32))
            b.store(_I32(0), _place(b, metadata, 32, _I32))  # no traits
            b.ret(null)
    arguments = _read(b, frame, 72, _POINTER.as_pointer())
    return b, frame, arguments, _read(b, frame, 112, _POINTER.as_pointer())


def data_of(b: ir.IRBuilder, buffer: Any, kind: ir.Type) -> Any:
    """The address of a buffer's values."""
    return _read(b, buffer, 24, kind.as_pointer())


def _place(b: ir.IRBuilder, base: Any, offset: int, kind: ir.Type) -> Any:
    return b.bitcast(b.gep(base, [_I64(offset)]), kind.as_pointer())


def _read(b: ir.IRBuilder, base: Any, offset: int, kind: ir.Type) -> Any:
    return b.load(_place(b, base, offset, kind))


def _handler(
    module: ir.Module, work: ir.Function, parts: int, cores: int, *, outputs_axis: int
) -> None:
    """The function that XLA calls for a product.

    Threads of XLA's pool help; if they are busy, this one does all the parts. It is long because
    every block of the function uses the values that the blocks before it defined.
    """
    b, frame, arguments, results = begin_handler(module)
    malloc = ir.Function(module, ir.FunctionType(_POINTER, [_I64]), "malloc")
    null, api = ir.Constant(_POINTER, None), _read(b, frame, 16, _POINTER)
    place, read = partial(_place, b), partial(_read, b)
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
    request = b.bitcast(b.alloca(_I64, _I64(5)), _POINTER)
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
