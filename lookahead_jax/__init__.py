"""Long prompts through a fixed-budget KV cache, with learned eviction, in JAX.

The public names below are imported when they are first used, so that importing the package (and
asking the command line for help) costs nothing.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lookahead_jax import policies as policies
    from lookahead_jax.cache import KVCache as KVCache
    from lookahead_jax.config import ModelConfig as ModelConfig

_HOME = {
    "KVCache": "cache",
    "ModelConfig": "config",
}

__all__ = ["EMBEDDED_MODEL", "policies", *_HOME]

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "base"
"""Folder of the small model that ships with the package."""


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("lookahead_jax.policies")
    if name not in _HOME:
        raise AttributeError(f"module 'lookahead_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lookahead_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
