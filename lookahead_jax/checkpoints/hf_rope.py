"""Reads the RoPE of a Hugging Face `config.json`, in the fields of transformers 4 and 5."""

from collections.abc import Mapping
from typing import Any

from lookahead_jax.checkpoints.hf_families import FAMILIES
from lookahead_jax.checkpoints.hf_fields import JsonFields
from lookahead_jax.model.config import RopeConfig


def ropes_from_hf(f: JsonFields, model_type: str, head_dim: int) -> tuple[RopeConfig, ...]:
    """The RoPE of a model, or the two of it: of all layers, and of those with a window."""
    # A rope_scaling wins over rope_parameters where both are present, as in transformers.
    scaling = f.optional("rope_scaling", Mapping) or {}
    parameters = f.optional("rope_parameters", Mapping) or {}
    nested = {"full_attention", "sliding_attention"} & set(parameters)
    if not FAMILIES[model_type].two_ropes:
        if nested:
            raise ValueError(f"{f.where}: rope_parameters per layer type are not supported")
        return (_rope(f, scaling or parameters, "rope_theta", model_type, head_dim),)
    if parameters and not nested:
        raise ValueError(f"{f.where}: rope_parameters must be nested by layer type")
    layered = JsonFields(parameters, f"{f.where} rope_parameters")
    both = (layered.optional(n, Mapping) or {} for n in ("full_attention", "sliding_attention"))
    full, sliding = both
    return (
        _rope(f, dict(full) | dict(scaling), "rope_theta", model_type, head_dim),
        _rope(f, sliding, "rope_local_base_freq", model_type, head_dim),
    )


def without_rotation(rope: RopeConfig) -> RopeConfig:
    """The rope of layers without RoPE."""
    return RopeConfig(kind="none", theta=rope.theta, dim=rope.dim, max_position=rope.max_position)


def _rope(
    f: JsonFields, parameters: Mapping[str, Any], theta_field: str, model_type: str, head_dim: int
) -> RopeConfig:
    """One RoPE object of a configuration `f`."""
    r = JsonFields(parameters, f"{f.where} rope")
    kind = r.optional("rope_type", str) or r.optional("type", str) or "default"
    if model_type == "phi3" and kind in ("su", "yarn"):  # what Phi-3 called longrope at first
        kind = "longrope"
    if kind == "none":  # ours, for the layers of SmolLM3 that have no RoPE
        raise ValueError(f"{f.where}: unknown rope_type 'none'")
    partial = r.optional("partial_rotary_factor", float)
    if partial is None:
        partial = f.required("partial_rotary_factor", float)
    if partial != 1.0 and not FAMILIES[model_type].partial_rope:
        raise ValueError(f"{f.where}: partial_rotary_factor is not supported")
    theta = r.optional("rope_theta", float)
    max_position = f.required("max_position_embeddings", int)
    if max_position < 1:
        raise ValueError(f"{f.where}: max_position_embeddings must be positive")
    # The top-level field wins over the one inside the rope object, as in transformers.
    original = (
        f.optional("original_max_position_embeddings", int)
        or r.optional("original_max_position_embeddings", int)
        or max_position
    )
    common = {
        "kind": kind,
        "theta": f.required(theta_field, float) if theta is None else theta,
        "dim": int(head_dim * partial),
        "max_position": max_position,
    }
    return _of_kind(kind, r, common, original)


def _of_kind(kind: str, r: JsonFields, common: dict[str, Any], original: int) -> RopeConfig:
    """The `common` fields and those of one kind; `original` is the length before extension."""
    max_position = common["max_position"]
    factor, attention_factor = (r.optional(n, float) for n in ("factor", "attention_factor"))
    match kind:
        case "linear" | "dynamic":
            return RopeConfig(**common, factor=factor)
        case "llama3":
            return RopeConfig(
                **common,
                factor=factor,
                low_freq_factor=r.optional("low_freq_factor", float),
                high_freq_factor=r.optional("high_freq_factor", float),
                original_max_position=original,
            )
        case "yarn":
            truncate = r.optional("truncate", bool)
            return RopeConfig(
                **common,
                factor=max_position / original if factor is None else factor,
                attention_factor=attention_factor,
                beta_fast=r.optional("beta_fast", float) or 32.0,
                beta_slow=r.optional("beta_slow", float) or 1.0,
                mscale=r.optional("mscale", float),
                mscale_all_dim=r.optional("mscale_all_dim", float),
                truncate=True if truncate is None else truncate,
                original_max_position=original,
            )
        case "longrope":
            return RopeConfig(
                **common,
                factor=max_position / original if factor is None else factor,
                attention_factor=attention_factor,
                short_factor=r.floats("short_factor"),
                long_factor=r.floats("long_factor"),
                original_max_position=original,
            )
    return RopeConfig(**common)
