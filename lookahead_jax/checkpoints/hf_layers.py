"""Reads from a Hugging Face `config.json` in what the layers of a model differ."""

from lookahead_jax.checkpoints.hf_families import FAMILIES
from lookahead_jax.checkpoints.hf_fields import JsonFields

_MAX_LAYERS = 10_000  # a wrong file must not make us build huge tuples


def sliding_layers(f: JsonFields, model_type: str) -> tuple[bool, ...]:
    """Per layer, whether it attends within the sliding window."""
    num_layers = f.required("num_hidden_layers", int)
    if not 1 <= num_layers <= _MAX_LAYERS:
        raise ValueError(f"{f.where}: num_hidden_layers {num_layers} is not in 1..{_MAX_LAYERS}")
    family = FAMILIES[model_type]
    if family.windows == "none":
        return (False,) * num_layers
    names = f.optional("layer_types", list)
    if names is not None and family.layer_types:
        if len(names) != num_layers or any(
            name not in ("sliding_attention", "full_attention") for name in names
        ):
            raise ValueError(
                f"{f.where}: layer_types must hold {num_layers} times sliding_attention or "
                f"full_attention, got {names}"
            )
        sliding = tuple(name == "sliding_attention" for name in names)
        if any(sliding) and f.values.get("use_sliding_window") is False:
            raise ValueError(
                f"{f.where}: layer_types has sliding_attention, but use_sliding_window is false"
            )
        return sliding
    if family.windows == "all":
        return (f.optional("sliding_window", int) is not None,) * num_layers
    if family.windows in ("used", "last", "without_rope"):
        used = f.required("use_sliding_window", bool) and f.values["sliding_window"] is not None
        if family.windows == "used":
            return (used,) * num_layers
        if family.windows == "without_rope":
            return tuple(used and not rotates for rotates in rotating_layers(f, num_layers))
        first = f.required("max_window_layers", int) if used else num_layers
        return tuple(layer >= first for layer in range(num_layers))
    period = 2
    if model_type == "gemma3_text":
        names = ("sliding_window_pattern", "_sliding_window_pattern")
        period = next((f.required(n, int) for n in names if f.values.get(n) is not None), 6)
    if period < 1:
        raise ValueError(f"{f.where}: sliding_window_pattern must be positive, got {period}")
    return tuple((layer + 1) % period != 0 for layer in range(num_layers))


def rotating_layers(f: JsonFields, num_layers: int) -> tuple[bool, ...]:
    """Per layer of SmolLM3, whether it has RoPE."""
    flags = f.optional("no_rope_layers", list)
    if flags is None:
        interval = f.required("no_rope_layer_interval", int)
        if interval < 1:
            raise ValueError(f"{f.where}: no_rope_layer_interval must be positive, got {interval}")
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise ValueError(
            f"{f.where}: no_rope_layers must hold a 1 (with RoPE) or 0 for each of {num_layers} "
            f"layers, got {flags}"
        )
    return tuple(flag == 1 for flag in flags[:num_layers])
