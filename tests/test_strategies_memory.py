"""What the rows of a search cost: the prompt once, and what each of them writes.

XLA says before running what a program allocates (`memory_analysis`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lookahead_jax.decoding.sampling import Sampling, sampling_rows
from lookahead_jax.decoding.state import start
from lookahead_jax.decoding.step import decode_burst
from lookahead_jax.model.cache import empty_cache
from lookahead_jax.model.params import abstract_params
from lookahead_jax.strategies.primitives import gather_rows, replace_last, replace_text
from tests import tiny

CONFIG = tiny.config(
    num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=32
)
PROMPT, NEW = 1024, 128
ENTRY = CONFIG.num_layers * CONFIG.num_kv_heads * (2 * CONFIG.head_dim + 1) * 4  # bytes of a token
REST = 4096  # bytes, at most, of what else a row has: tokens, settings, statistics


def opened(rows: int, *, prompt: int = PROMPT, branched: bool = True):
    """Rows behind a prompt that they share, or behind prompts of their own."""
    prompts = 1 if branched else rows
    slots = prompt if branched else prompt + NEW
    cache = empty_cache(CONFIG, prompts, slots, jnp.float32, jnp.zeros(prompts, jnp.int32))
    sampling = [Sampling(temperature=0.8)] * rows
    return start(
        cache.branch(rows, slots=NEW) if branched else cache,
        jnp.zeros((rows, CONFIG.vocab_size)),
        sampling=sampling_rows(sampling, [0] * rows, CONFIG.vocab_size),
        limit=jnp.full(rows, NEW),
        eos=jnp.zeros(1, jnp.int32),
        seen=None,
        width=NEW,
    )


def allocated(rows: int, *, branched: bool) -> int:
    """Bytes of a burst's arguments, with the state of all rows, and of its temporaries."""
    state = jax.eval_shape(lambda: opened(rows, branched=branched))
    weights = abstract_params(CONFIG, jnp.float32)
    program = decode_burst.lower(weights, state, config=CONFIG, steps=4).compile()
    memory: Any = program.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert new < REST, "the state is updated in place"
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.parametrize("branched", [True, False])
def test_a_row_costs_what_it_writes(branched):
    per_row = (allocated(6, branched=branched) - allocated(2, branched=branched)) / 4
    own = NEW if branched else PROMPT + NEW
    scores = 4 * CONFIG.num_heads * (PROMPT + NEW)  # of a row's attention: temporaries
    assert own * ENTRY <= per_row <= own * ENTRY + REST + 2 * scores


def test_moving_rows_copies_no_prompt():
    state = opened(4, prompt=NEW)
    index, tokens = jnp.asarray([1, 1, 3, 0], jnp.int32), jnp.full(4, 7, jnp.int32)
    gathered = gather_rows(state, index, state.sampling)
    last = replace_last(state, tokens, jnp.ones(4, bool))
    cut = replace_text(state, state.tokens, state.count, state.cache.next_pos)

    def places(tree):
        return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(tree)]

    for moved in (gathered, last, cut):
        assert places(moved.cache.shared) == places(state.cache.shared)
    for moved in (last, cut):  # and no keys and values
        assert places((moved.cache.k, moved.cache.v)) == places((state.cache.k, state.cache.v))
