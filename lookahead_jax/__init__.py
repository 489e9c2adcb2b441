"""Long prompts through a fixed-budget KV cache, with learned eviction, in JAX.

Public names are imported when they are first used, so that importing the package, and asking the
command line for help, costs nothing.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOME, for type checkers and editors
    from lookahead_jax import policies
    from lookahead_jax.batching import pad_batch, slots_for
    from lookahead_jax.cache import KVCache
    from lookahead_jax.cache_files import load_cache, save_cache
    from lookahead_jax.checkpoint import Model, load
    from lookahead_jax.config import ModelConfig
    from lookahead_jax.controller import Controller
    from lookahead_jax.decoding import decode
    from lookahead_jax.engine import Engine
    from lookahead_jax.generation import Generation, generate
    from lookahead_jax.lookahead import LookaheadModules, load_modules
    from lookahead_jax.model import Block, embed, forward, logits
    from lookahead_jax.policies import make_policy
    from lookahead_jax.prefill import extend, prefill
    from lookahead_jax.program import compiler_options
    from lookahead_jax.reading import read_prompt
    from lookahead_jax.requests import Event, Request, Result
    from lookahead_jax.sampling import Sampling
    from lookahead_jax.scoring import score, token_logits

__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_MODULES",
    "Block",
    "Controller",
    "Engine",
    "Event",
    "Generation",
    "KVCache",
    "LookaheadModules",
    "Model",
    "ModelConfig",
    "Request",
    "Result",
    "Sampling",
    "compiler_options",
    "decode",
    "embed",
    "extend",
    "forward",
    "generate",
    "load",
    "load_cache",
    "load_modules",
    "logits",
    "make_policy",
    "pad_batch",
    "policies",
    "prefill",
    "read_prompt",
    "save_cache",
    "score",
    "slots_for",
    "token_logits",
]

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "base"
"""Folder of the small model that ships with the package."""
EMBEDDED_MODULES = Path(__file__).parent / "assets" / "lookahead"
"""Folder of that model's lookahead modules."""

_HOME = {
    "batching": ("pad_batch", "slots_for"),
    "cache": ("KVCache",),
    "cache_files": ("load_cache", "save_cache"),
    "checkpoint": ("Model", "load"),
    "config": ("ModelConfig",),
    "controller": ("Controller",),
    "decoding": ("decode",),
    "engine": ("Engine",),
    "generation": ("Generation", "generate"),
    "lookahead": ("LookaheadModules", "load_modules"),
    "model": ("Block", "embed", "forward", "logits"),
    "policies": ("make_policy",),
    "prefill": ("extend", "prefill"),
    "program": ("compiler_options",),
    "reading": ("read_prompt",),
    "requests": ("Event", "Request", "Result"),
    "sampling": ("Sampling",),
    "scoring": ("score", "token_logits"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


class _Package(types.ModuleType):
    """Keeps the submodule `prefill` from taking the place of the public function `prefill`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("lookahead_jax.policies")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
