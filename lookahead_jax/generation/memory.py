"""Refuses caches that cannot fit, before they are allocated."""

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.generation.settings import EvictionSettings
from lookahead_jax.host.memory import free_bytes
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prompts.sharing import shared_tokens

_POSITION_BYTES = 4
_SCALE_BYTES = 4


def check_memory(
    model: Model,
    eviction: EvictionSettings,
    *,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    prompt_store_bytes: int = 0,
    prefix_store_bytes: int = 0,
) -> None:
    """Raises ValueError if cache and full stores need more memory than the model's devices have.

    The free memory of one device counts for each of them. Without this check the kernel may kill
    the process: on a host, JAX allocates more than there is. The stores are those of an engine.
    """
    config, weights = model.config, model.params["embed"]
    if eviction.evict_every is not None:
        new_tokens = min(new_tokens, eviction.evict_every)
    of_prompt, added = eviction.budget - eviction.staying, eviction.staying + new_tokens
    slots = slots_for(eviction.policy, prompt_tokens, max(of_prompt, 0), added, config=config)
    vector = config.head_dim * weights.dtype.itemsize
    if eviction.cache_dtype is not None:
        vector = config.head_dim + _SCALE_BYTES
    entry = 2 * vector + _POSITION_BYTES
    cache = rows * slots * config.num_layers * config.num_kv_heads * entry
    if not shared_tokens(eviction.policy, config):
        prefix_store_bytes = 0  # nothing is stored
    stores = prompt_store_bytes + prefix_store_bytes
    devices = list(weights.sharding.device_set)
    free = free_bytes(devices[0])
    if devices[0].platform != "cpu" and free is not None:
        free *= len(devices)
    if free is None or cache + stores <= free:
        return
    also, smaller = "", [f"max_new_tokens ({new_tokens:,})", f"the budget ({eviction.budget:,})"]
    if stores:
        also = f" and the stores of prompts and prefixes up to {stores / 1e9:,.1f} GB"
        for name, size in dict(prompt=prompt_store_bytes, prefix=prefix_store_bytes).items():
            smaller.append(f"--{name}-store-mb ({name}_store_bytes, {size / 1e6:,.0f} MB)")
    raise ValueError(
        f"the cache needs {cache / 1e9:,.1f} GB ({rows} rows of {slots:,} entries per layer and "
        f"head){also}, but {free / 1e9:,.1f} GB are free: lower {', '.join(smaller)} or the number "
        "of rows"
    )
