"""Refuses caches that cannot fit, before they are allocated."""

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.generation.settings import EvictionSettings
from lookahead_jax.host.memory import free_bytes
from lookahead_jax.prefilling.batching import slots_for

_POSITION_BYTES = 4
_SCALE_BYTES = 4


def check_memory(
    model: Model, eviction: EvictionSettings, *, rows: int, prompt_tokens: int, new_tokens: int
) -> None:
    """Raises ValueError if the cache alone needs more memory than is free on the model's devices.

    The free memory of one device counts for each of them. Without this check the kernel may kill
    the process: on a host, JAX allocates more than there is.
    """
    config, weights = model.config, model.params["embed"]
    if eviction.evict_every is not None:
        new_tokens = min(new_tokens, eviction.evict_every)
    slots = slots_for(eviction.policy, prompt_tokens, eviction.budget, new_tokens, config=config)
    vector = config.head_dim * weights.dtype.itemsize
    if eviction.cache_dtype is not None:
        vector = config.head_dim + _SCALE_BYTES
    entry = 2 * vector + _POSITION_BYTES
    needed = rows * slots * config.num_layers * config.num_kv_heads * entry
    devices = list(weights.sharding.device_set)
    free = free_bytes(devices[0])
    if devices[0].platform != "cpu" and free is not None:
        free *= len(devices)
    if free is not None and needed > free:
        raise ValueError(
            f"the cache needs {needed / 1e9:,.1f} GB ({rows} rows of {slots:,} entries per layer "
            f"and head) and {free / 1e9:,.1f} GB are free: lower max_new_tokens "
            f"({new_tokens:,}), the budget ({eviction.budget:,}) or the number of rows"
        )
