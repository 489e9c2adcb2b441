"""How far a pass over the layers is, on CPUs: compiled programs note every layer that they begin.

A pass is one program, which says nothing before it ends. Callbacks of JAX could say it, but
programs with callbacks are not kept in JAX's compilation cache.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from llvmlite import ir

from lookahead_jax.kernels.cpu_calls import (
    begin_handler,
    data_of,
    layout_is_known,
    made_once,
    register_handler,
)
from lookahead_jax.kernels.dispatch import target_platform

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_NAME = "lookahead_layer_count"
_layer = ctypes.c_int32(0)  # what the program wrote last, of whichever program
_counting: ContextVar[bool] = ContextVar("counting", default=False)


@contextlib.contextmanager
def counted_layers() -> Iterator[Callable[[], int]]:
    """Programs that are traced inside note their layers; yields what tells the last one, from 0."""
    _layer.value = 0
    token = _counting.set(True)
    try:
        yield lambda: _layer.value
    finally:
        _counting.reset(token)


def noted(layer: jax.Array) -> jax.Array:
    """`layer`, an int32 scalar, noted when the program computes it; see `counted_layers`."""
    several = jax.device_count() > 1  # XLA refuses the call where arrays are spread over devices
    if not _counting.get() or target_platform() != "cpu" or several or not layout_is_known():
        return layer
    _register()
    return jax.ffi.ffi_call(_NAME, jax.ShapeDtypeStruct((), jnp.int32), has_side_effect=True)(layer)


@made_once
def _register() -> None:
    """Compiles the function, which copies its argument to `_layer` and to its result."""
    module = ir.Module(_NAME)
    b, _, arguments, results = begin_handler(module)
    layer = b.load(data_of(b, b.load(arguments), _I32))
    address = _I64(ctypes.addressof(_layer))
    b.store(layer, b.inttoptr(address, _I32.as_pointer()))
    b.store(layer, data_of(b, b.load(results), _I32))
    b.ret(ir.Constant(b.function.return_value.type, None))
    register_handler(module)
