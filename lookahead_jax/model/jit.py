"""`jax.jit` for programs that run a model, with what XLA has to be told on GPUs.

Layers are one loop over stacked weights. XLA's own matrix products on GPUs (by Triton) take each
layer's weights as a copy out of the stack: three times the bytes where a token's time is that of
reading the weights once. cuBLAS reads them in place, if products that share their input are not
first joined by copying their weights side by side, and if a layer is not a CUDA graph, which would
be written anew for every layer's addresses. docs/decisions.md has the figures.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.core import Tracer

from lookahead_jax.kernels.dispatch import target_platform

P = ParamSpec("P")
R = TypeVar("R")
_GPU = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_enable_command_buffer": "FUSION",
}


def compiler_options() -> dict[str, bool | str | int | float]:
    """`compiler_options` for a `jax.jit` of your own around this library.

    Empty on other platforms than GPUs, and where they bring nothing (jax below 0.11).

    JAX takes them for an outermost `jax.jit` only. The library's own programs are compiled with
    them where they are called from Python; inside another program that one's options count.
    """
    return dict(_GPU) if target_platform() in ("gpu", "cuda") and _known() else {}


@functools.cache
def _known() -> bool:
    """Whether this jax reads a stack in place, and its XLA still knows the options."""
    if jax.__version_info__ < (0, 11):
        return False
    try:
        jax.jit(lambda x: x + 1, compiler_options=_GPU).lower(1.0).compile()
    except jax.errors.JaxRuntimeError as error:
        logging.getLogger(__name__).warning("GPU programs are slower than they could be: %s", error)
        return False
    return True


class Program(Generic[P, R]):
    """A jitted function; called from Python for a GPU it is compiled with `compiler_options()`."""

    def __init__(self, f: Callable[P, R], settings: dict[str, Any]):
        functools.update_wrapper(self, f)
        self._plain: Any = jax.jit(f, **settings)
        self._for_gpu: Any = jax.jit(f, **settings, compiler_options=_GPU)

    def _program(self, args: Any) -> Any:
        if not compiler_options():
            return self._plain
        # Another program may call with constants alone; what is computed there is traced.
        inner = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args))
        inner = inner or isinstance(jax.lax.full((), 0.0), Tracer)
        return self._plain if inner else self._for_gpu

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._program((args, kwargs))(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What else `jax.jit` has (`trace`, `eval_shape`, `clear_cache`), without the options."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._plain, name)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered:
        """As of `jax.jit`: for compiling ahead of time."""
        return self._program((args, kwargs)).lower(*args, **kwargs)

    def compiled(self) -> int:
        """How many times it has been compiled in this process."""
        return self._plain._cache_size() + self._for_gpu._cache_size()


def program(
    *, static_argnames: Sequence[str] = (), donate_argnames: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Program[P, R]]:
    """A decorator: `Program` of a function, with these arguments of `jax.jit`."""
    settings = dict(static_argnames=tuple(static_argnames), donate_argnames=tuple(donate_argnames))
    return lambda f: Program(f, settings)
