"""Long prompts through a fixed-budget KV cache, with learned eviction, in JAX.

Public names are imported when they are first used, so that importing the package, and asking the
command line for help, costs nothing.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOME, for type checkers and editors
    from lookahead_jax import policies
    from lookahead_jax.checkpoints.cache_files import load_cache, save_cache
    from lookahead_jax.checkpoints.hf_config import config_from_hf
    from lookahead_jax.checkpoints.load import Model, load
    from lookahead_jax.decoding.grammar import Grammar
    from lookahead_jax.decoding.node_choice import Controller
    from lookahead_jax.decoding.sampling import Sampling
    from lookahead_jax.decoding.step import decode
    from lookahead_jax.engine.engine import Engine
    from lookahead_jax.engine.requests import Event, Request, Result
    from lookahead_jax.generation.generate import generate
    from lookahead_jax.generation.results import Generation
    from lookahead_jax.generation.score import score, token_logits
    from lookahead_jax.model.cache import KVCache
    from lookahead_jax.model.config import ModelConfig
    from lookahead_jax.model.decoder import Block, embed, forward, logits
    from lookahead_jax.model.jit import compiler_options
    from lookahead_jax.modules.definition import LookaheadModules
    from lookahead_jax.modules.files import load_modules
    from lookahead_jax.modules.reward_head import RewardHead, reward_head
    from lookahead_jax.policies.registry import make_policy
    from lookahead_jax.prefilling.batching import pad_batch, pin_mask, slots_for
    from lookahead_jax.prefilling.prefill import extend, prefill
    from lookahead_jax.prompts.read import read_prompt
    from lookahead_jax.strategies.registry import make_strategy
    from lookahead_jax.strategies.search import SearchResult, search
    from lookahead_jax.strategies.verifier import model_verifier

    __version__: str

if importlib.util.find_spec("lookahead_jax.kernels") is None:
    raise ImportError(
        "this checkout of lookahead_jax has no symbolic links, so lookahead_jax/kernels is not a "
        "folder: install it with `pip install .`, or run `git -c core.symlinks=true clone URL`"
    )

__all__ = [
    "EMBEDDED_MODEL",
    "EMBEDDED_MODULES",
    "Block",
    "Controller",
    "Engine",
    "Event",
    "Generation",
    "Grammar",
    "KVCache",
    "LookaheadModules",
    "Model",
    "ModelConfig",
    "Request",
    "Result",
    "RewardHead",
    "Sampling",
    "SearchResult",
    "compiler_options",
    "config_from_hf",
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
    "make_strategy",
    "model_verifier",
    "pad_batch",
    "pin_mask",
    "policies",
    "prefill",
    "read_prompt",
    "reward_head",
    "save_cache",
    "score",
    "search",
    "slots_for",
    "token_logits",
]

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "base"
"""Folder of the small model that ships with the package."""
EMBEDDED_MODULES = Path(__file__).parent / "assets" / "lookahead"
"""Folder of that model's lookahead modules."""

_HOME = {
    "checkpoints.cache_files": ("load_cache", "save_cache"),
    "checkpoints.hf_config": ("config_from_hf",),
    "checkpoints.load": ("Model", "load"),
    "decoding.grammar": ("Grammar",),
    "decoding.node_choice": ("Controller",),
    "decoding.sampling": ("Sampling",),
    "decoding.step": ("decode",),
    "engine.engine": ("Engine",),
    "engine.requests": ("Event", "Request", "Result"),
    "generation.generate": ("generate",),
    "generation.results": ("Generation",),
    "generation.score": ("score", "token_logits"),
    "model.cache": ("KVCache",),
    "model.config": ("ModelConfig",),
    "model.decoder": ("Block", "embed", "forward", "logits"),
    "model.jit": ("compiler_options",),
    "modules.definition": ("LookaheadModules",),
    "modules.files": ("load_modules",),
    "modules.reward_head": ("RewardHead", "reward_head"),
    "policies.registry": ("make_policy",),
    "prefilling.batching": ("pad_batch", "pin_mask", "slots_for"),
    "prefilling.prefill": ("extend", "prefill"),
    "prompts.read": ("read_prompt",),
    "strategies.registry": ("make_strategy",),
    "strategies.search": ("SearchResult", "search"),
    "strategies.verifier": ("model_verifier",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("lookahead_jax.policies")
    if name == "__version__":
        return _version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def _version() -> str:
    from importlib import metadata  # slow to import, and rarely needed

    try:
        return metadata.version("lookahead-jax")
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
