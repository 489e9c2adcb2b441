"""What prefill holds while it reads: the residual stream and one layer's keys and values.

XLA says before running how much a program allocates (`memory_analysis`). Two prompts that differ
only in length show what a prompt token costs; two models that differ only in depth, that it does
not depend on the layers.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from lookahead_jax.model.params import abstract_params
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling.batching import slots_for
from lookahead_jax.prefilling.prefill import prefill
from tests import tiny

D, N, K, H = 64, 4, 4, 32
SHAPE = dict(hidden_size=D, num_attention_heads=N, num_key_value_heads=K, head_dim=H)
SNAPKV = SnapKV(window=16, pool="avg", kernel=5)
SHORT, LONG = 1024, 2048
# Not with the scheduler of conftest.py, which is for programs of several devices.
AS_USERS_COMPILE = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"}
# Per prompt token, in float32 numbers: the residual stream; the keys and values of one layer,
# twice because XLA on CPU keeps what enters a loop beside what the loop carries; cos and sin;
# positions and scores. A second layer's keys and values (256 numbers) would exceed it.
NUMBERS_PER_TOKEN = D + 2 * (2 * K * H) + H + 4 * N


@functools.cache
def allocated(layers: int, tokens: int, policy: Policy) -> tuple[int, int]:
    """Bytes of temporaries, and of the cache with the logits, for one prompt."""
    model = tiny.config(num_hidden_layers=layers, **SHAPE)
    slots = slots_for(policy, tokens, 64, 16, config=model)
    program = prefill.lower(
        abstract_params(model, jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        config=model,
        policy=policy,
        budget=64,
        slots=slots,
        new_tokens=16,
        chunk=128,
    ).compile(AS_USERS_COMPILE)
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes, memory.output_size_in_bytes


def bytes_per_token(layers: int, policy: Policy) -> float:
    """Growth of everything allocated with one more prompt token."""
    return (sum(allocated(layers, LONG, policy)) - sum(allocated(layers, SHORT, policy))) / (
        LONG - SHORT
    )


@pytest.mark.parametrize("layers", [2, 5])
def test_a_prompt_token_costs_its_residual_and_one_layer(layers):
    assert bytes_per_token(layers, SNAPKV) <= 4 * NUMBERS_PER_TOKEN


def test_depth_adds_only_the_budgeted_cache():
    shallow, deep = allocated(2, LONG, SNAPKV), allocated(5, LONG, SNAPKV)
    assert deep[0] - shallow[0] <= 1024  # temporaries: nothing per layer
    slots = slots_for(SNAPKV, LONG, 64, 16, config=tiny.config(num_hidden_layers=2, **SHAPE))
    per_layer = 4 * (K * slots * (2 * H + 1) + K)  # keys, values, positions; lengths
    assert deep[1] - shallow[1] == 3 * per_layer


def test_keeping_everything_breaks_the_bound():
    assert bytes_per_token(5, Full()) > 4 * NUMBERS_PER_TOKEN
