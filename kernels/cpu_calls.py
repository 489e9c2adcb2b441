"""Functions made of LLVM's code as XLA calls them on CPUs, with the threads of XLA's pool.

XLA's foreign function interface (https://openxla.org/xla/custom_call) hands a call frame to a
function of C. Its layout is that of xla/ffi/api/c_api.h, which comes with jaxlib.
"""

import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from llvmlite import binding, ir

from lookahead_jax.kernels.cpu_code import BYTES, I32, I64, POINTER, loop


@functools.cache
def layout_is_known() -> bool:
    """Whether XLA calls functions as `_handler` reads it: major version 0 of the interface."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return False
    found = re.search(r"#define XLA_FFI_API_MAJOR (\d+)", header.read_text("utf-8"))
    return found is not None and found[1] == "0"


T = TypeVar("T")
_making = threading.Lock()


def made_once(make: Callable[..., T]) -> Callable[..., T]:
    """Caches what a function makes; of several threads, one makes it.

    XLA refuses a second target of the same name.
    """
    cached = functools.cache(make)

    @functools.wraps(make)
    def locked(*arguments: Any) -> T:
        with _making:
            return cached(*arguments)

    return locked


_compiled: list[Any] = []  # machine code that XLA may call as long as the process lives


def cores_to_use() -> int:
    """Threads of a call: more than eight are no faster, since all read the same memory."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 8)


@functools.cache
def vector_registers() -> int:
    """Registers for vectors of 16 floats: AVX-512 has 32; AVX's and NEON's hold 8 in pieces."""
    return 32 if binding.get_host_cpu_features().get("avx512f") else 8


class Plan(NamedTuple):
    """What the threads of a call need to know, as i64 of LLVM's code."""

    values: Sequence[Any]  # what parts read
    parts: Any
    threads: Any  # that take them, this one included
    scratch: Any = I64(0)  # bytes of memory; the address is one more value, the last


def register_product(
    product: ir.Function, *, cores: int, parts: int, unit: int, outputs_axis: int
) -> None:
    """Makes a product known to XLA as a target with the name of its module.

    `product(x, matrix, y, K, N, first, last)` computes the outputs `first` to `last`, multiples of
    `unit`, of x [P, K] times a matrix with N outputs on its axis `outputs_axis`. `cores` threads
    take `parts` parts each, because they begin at different times.
    """
    total = cores * parts if cores > 1 else 1

    def plan(b: ir.IRBuilder, arguments: Any, results: Any) -> Plan:
        x, matrix = (b.load(b.gep(arguments, [I64(i)])) for i in range(2))
        addresses = [b.ptrtoint(data_of(b, a, BYTES), I64) for a in (x, matrix, b.load(results))]
        sizes = [dimension_of(b, x, 1), dimension_of(b, matrix, outputs_axis)]
        return Plan([*addresses, *sizes], I64(total), I64(cores))

    def run(b: ir.IRBuilder, values: Any, part: Any) -> None:
        *addresses, inputs, outputs = (b.load(b.gep(values, [I64(i)])) for i in range(5))
        places = zip(addresses, product.args, strict=False)
        pointers = [b.inttoptr(address, to.type) for address, to in places]
        units = b.sdiv(outputs, I64(unit))
        first, last = (
            b.mul(b.sdiv(b.mul(units, n), I64(total)), I64(unit))
            for n in (part, b.add(part, I64(1)))
        )
        b.call(product, [*pointers, inputs, outputs, first, last])

    register_parallel(product.module, plan=plan, run=run, helped=cores > 1)


def register_parallel(
    module: ir.Module,
    *,
    plan: Callable[[ir.IRBuilder, Any, Any], Plan],
    run: Callable[[ir.IRBuilder, Any, Any], Any],
    finish: Callable[[ir.IRBuilder, Any], Any] | None = None,
    helped: bool = True,
) -> None:
    """Makes a call whose parts several threads take known to XLA, by the name of its module.

    All three write code: `plan(b, arguments, results)` from arrays of XLA's buffers, `run(b,
    values, part)` that of one part, where `values` is the array of the plan's values, and
    `finish(b, values)` what remains after the last part. Without `helped` no thread is asked.
    """
    work = _work(module, run)
    _handler(module, work, plan, finish, helped=helped)
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
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


# What the threads of a call share, as i64: the next part, finished parts, threads that may still
# look here, and the number of parts; then the plan's values.
_NEXT, _FINISHED, _USERS, _PARTS, _VALUES = 0, 1, 2, 3, 4


def _work(module: ir.Module, run: Callable[[ir.IRBuilder, Any, Any], Any]) -> ir.Function:
    """`void work(i64* shared)`: takes parts until none is left, then leaves; the last one frees."""
    work = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), "work")
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), "free")
    b = ir.IRBuilder(work.append_basic_block())
    shared = b.bitcast(work.args[0], I64.as_pointer())
    parts = b.load(b.gep(shared, [I64(_PARTS)]))
    take, running, leave = (b.append_basic_block() for _ in range(3))
    b.branch(take)
    b.position_at_end(take)
    part = b.atomic_rmw("add", b.gep(shared, [I64(_NEXT)]), I64(1), "monotonic")
    b.cbranch(b.icmp_signed("<", part, parts), running, leave)
    b.position_at_end(running)
    run(b, b.gep(shared, [I64(_VALUES)]), part)
    b.atomic_rmw("add", b.gep(shared, [I64(_FINISHED)]), I64(1), "release")
    b.branch(take)
    b.position_at_end(leave)
    users = b.atomic_rmw("sub", b.gep(shared, [I64(_USERS)]), I64(1), "acq_rel")
    with b.if_then(b.icmp_signed("==", users, I64(1))):
        b.call(free, [work.args[0]])
    b.ret_void()
    return work


def _no_memory(b: ir.IRBuilder, module: ir.Module, api: Any) -> Any:
    """An error of XLA's interface: there is no memory for a call."""
    text = bytearray(b"a kernel on the CPU found no memory for its sums: use smaller batches\0")
    kind = ir.ArrayType(BYTES, len(text))
    message: Any = ir.GlobalVariable(module, kind, "no_memory")
    message.linkage, message.global_constant = "internal", True
    message.initializer = ir.Constant(kind, text)
    create = _read(b, api, 48, ir.FunctionType(POINTER, [POINTER]).as_pointer())
    request = b.bitcast(b.alloca(I64, I64(4)), POINTER)  # XLA_FFI_Error_Create_Args
    b.store(I64(32), _place(b, request, 0, I64))
    b.store(ir.Constant(POINTER, None), _place(b, request, 8, POINTER))
    b.store(b.bitcast(message, POINTER), _place(b, request, 16, POINTER))
    b.store(I32(8), _place(b, request, 24, I32))  # RESOURCE_EXHAUSTED
    return b.call(create, [request])


def begin_handler(module: ir.Module) -> tuple[ir.IRBuilder, Any, Any, Any]:
    """`XLA_FFI_Error* handler(XLA_FFI_CallFrame*)`, named as the module, up to where it is called.

    XLA asks once for metadata, the version of the interface, then calls it with buffers. Returns
    the builder, the frame, and the arrays of pointers to the buffers of arguments and results.
    """
    handler = ir.Function(module, ir.FunctionType(POINTER, [POINTER]), module.name)
    b, frame = ir.IRBuilder(handler.append_basic_block()), handler.args[0]
    null = ir.Constant(POINTER, None)
    extension, api = _read(b, frame, 8, POINTER), _read(b, frame, 16, POINTER)
    with b.if_then(b.icmp_unsigned("!=", extension, null)):
        is_metadata = b.icmp_signed("==", _read(b, extension, 8, I32), I32(1))
        with b.if_then(is_metadata):
            metadata = _read(b, extension, 24, POINTER)
            for offset, of_api in ((24, 32), (28, 36)):  # the version, major and minor
                b.store(_read(b, api, of_api, I32), _place(b, metadata, offset, I32))
            b.store(I32(0), _place(b, metadata, 32, I32))  # no traits
            b.ret(null)
    arguments = _read(b, frame, 72, POINTER.as_pointer())
    return b, frame, arguments, _read(b, frame, 112, POINTER.as_pointer())


def data_of(b: ir.IRBuilder, buffer: Any, kind: ir.Type) -> Any:
    """The address of a buffer's values."""
    return _read(b, buffer, 24, kind.as_pointer())


def dimension_of(b: ir.IRBuilder, buffer: Any, axis: int) -> Any:
    """The size of a buffer's axis, an i64."""
    return b.load(b.gep(_read(b, buffer, 40, I64.as_pointer()), [I64(axis)]))


def _place(b: ir.IRBuilder, base: Any, offset: int, kind: ir.Type) -> Any:
    return b.bitcast(b.gep(base, [I64(offset)]), kind.as_pointer())


def _read(b: ir.IRBuilder, base: Any, offset: int, kind: ir.Type) -> Any:
    return b.load(_place(b, base, offset, kind))


def _handler(
    module: ir.Module,
    work: ir.Function,
    plan: Callable[[ir.IRBuilder, Any, Any], Plan],
    finish: Callable[[ir.IRBuilder, Any], Any] | None,
    *,
    helped: bool,
) -> None:
    """The function that XLA calls.

    Threads of XLA's pool help; if they are busy, this one does all the parts. It is long because
    every block of the function uses the values that the blocks before it defined.
    """
    b, frame, arguments, results = begin_handler(module)
    malloc = ir.Function(module, ir.FunctionType(POINTER, [I64]), "malloc")
    null, api = ir.Constant(POINTER, None), _read(b, frame, 16, POINTER)
    place, read = partial(_place, b), partial(_read, b)
    planned = plan(b, arguments, results)
    header = 8 * (_VALUES + len(planned.values) + 1)
    shared = b.call(malloc, [b.add(planned.scratch, I64(header))])
    with b.if_then(b.icmp_unsigned("==", shared, null)):
        b.ret(_no_memory(b, module, api))
    scratch = b.ptrtoint(b.gep(shared, [I64(header)]), I64)
    numbers = [I64(0), I64(0), b.add(planned.threads, I64(1)), planned.parts]
    for i, value in enumerate([*numbers, *planned.values, scratch]):
        b.store(value, place(shared, 8 * i, I64))

    def leave() -> Any:
        return b.atomic_rmw("sub", place(shared, 8 * _USERS, I64), I64(1), "acq_rel")

    call = ir.FunctionType(POINTER, [POINTER])
    schedule, destroy = (read(api, offset, call.as_pointer()) for offset in (136, 64))
    request = b.bitcast(b.alloca(I64, I64(5)), POINTER)
    context = read(frame, 24, POINTER)
    fields = (null, context, b.bitcast(work, POINTER), shared)
    with loop(b, I64(1), planned.threads):  # XLA_FFI_ThreadPool_Schedule
        b.store(I64(40), place(request, 0, I64))
        for i, field in enumerate(fields, start=1):
            b.store(field, place(request, 8 * i, POINTER))
        error = b.call(schedule, [request])
        with b.if_then(b.icmp_unsigned("!=", error, null)):  # there is no pool
            leave()
            b.store(I64(24), place(request, 0, I64))  # XLA_FFI_Error_Destroy
            b.store(error, place(request, 16, POINTER))
            b.call(destroy, [request])
    b.call(work, [shared])
    waiting, done = b.append_basic_block(), b.append_basic_block()
    b.branch(waiting)
    b.position_at_end(waiting)
    if helped and hasattr(os, "sched_getaffinity"):  # Linux, where libc has it
        b.call(ir.Function(module, ir.FunctionType(I32, []), "sched_yield"), [])
    finished = b.load_atomic(place(shared, 8 * _FINISHED, I64), "acquire", 8)
    b.cbranch(b.icmp_signed("<", finished, planned.parts), waiting, done)
    b.position_at_end(done)
    if finish is not None:
        finish(b, b.bitcast(place(shared, 8 * _VALUES, I64), I64.as_pointer()))
    with b.if_then(b.icmp_signed("==", leave(), I64(1))):
        b.call(module.globals["free"], [shared])
    b.ret(null)
