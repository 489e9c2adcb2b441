"""`jax.jit` for programs that run a model, with the compiler options that GPUs need.

The layers are one loop over stacked weights. By default XLA's matrix products on GPUs (Triton)
copy each layer's weights out of the stack: three times the bytes, where reading the weights once
already sets the time per token. cuBLAS reads them in place. For that, products that share an input
must not be merged (merging copies their weights side by side), and a layer must not be a CUDA
graph (it would be rewritten for every layer's addresses). docs/decisions.md has the figures.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.core import Tracer

from lookahead_jax.host.activity import activity
from lookahead_jax.kernels.dispatch import target_platform

P = ParamSpec("P")
R = TypeVar("R")
_GPU = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_enable_command_buffer": "FUSION",
}


def compiler_options() -> dict[str, bool | str | int | float]:
    """`compiler_options` for your own `jax.jit` around this library's functions.

    Empty on platforms other than GPUs, and for jax below 0.11, where they have no effect.

    JAX accepts them for the outermost `jax.jit` only. The library's own programs use them when
    they are called from Python. Inside another program, the options of that program apply.
    """
    return dict(_GPU) if target_platform() in ("gpu", "cuda") and _known() else {}


@functools.cache
def _known() -> bool:
    """Whether this jax reads a stack in place and its XLA accepts the options."""
    if jax.__version_info__ < (0, 11):
        return False
    try:
        jax.jit(lambda x: x + 1, compiler_options=_GPU).lower(1.0).compile()
    except jax.errors.JaxRuntimeError as error:
        logging.getLogger(__name__).warning(
            "XLA refuses the compiler options for GPUs, so programs run slower: %s", error
        )
        return False
    return True


def is_traced(tree: Any) -> bool:
    """Whether any leaf is a tracer: the caller runs under jit, vmap, grad or eval_shape."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def check_not_donated(name: str, tree: Any) -> None:
    """Raises ValueError if an array of `tree`, passed to function `name`, was donated before."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
            raise ValueError(
                f"{name}: an argument (usually the cache) was donated to an earlier call, such as "
                "decode or extend, and no longer exists. Use the cache which that call returned; "
                "to keep the original, pass cache.fork(1) to the earlier call"
            )


class Program(Generic[P, R]):
    """A jitted function; called from Python on a GPU it is compiled with `compiler_options()`.

    Raises ValueError, with the remedy, for an argument that an earlier call has consumed.
    """

    def __init__(self, f: Callable[P, R], settings: dict[str, Any]):
        functools.update_wrapper(self, f)
        self._plain: Any = jax.jit(f, **settings)
        self._for_gpu: Any = jax.jit(f, **settings, compiler_options=_GPU)

    def _program(self, args: Any) -> Any:
        if not compiler_options():
            return self._plain
        # A caller that is being traced may pass constants only, so the arguments do not tell.
        inner = is_traced(args) or isinstance(jax.lax.full((), 0.0), Tracer)
        return self._plain if inner else self._for_gpu

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with activity("compiling"):  # else a call takes no time: devices compute on their own
                return self._program((args, kwargs))(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if "deleted" in str(error):
                check_not_donated(getattr(self, "__name__", "program"), (args, kwargs))
            raise

    def __getattr__(self, name: str) -> Any:
        """Other attributes of `jax.jit` (`trace`, `eval_shape`, `clear_cache`), without options."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._plain, name)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered:
        """`jax.jit(f).lower`, for ahead-of-time compilation."""
        return self._program((args, kwargs)).lower(*args, **kwargs)

    def compiled(self) -> int:
        """How many times it has been compiled in this process."""
        return self._plain._cache_size() + self._for_gpu._cache_size()


def program(
    *, static_argnames: Sequence[str] = (), donate_argnames: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Program[P, R]]:
    """A decorator that makes a function a `Program`, with these arguments of `jax.jit`."""
    settings = dict(static_argnames=tuple(static_argnames), donate_argnames=tuple(donate_argnames))
    return lambda f: Program(f, settings)
