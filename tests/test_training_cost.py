"""What training costs: FLOPs as XLA counts them on an unrolled model, memory as it allocates it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.model import layers
from lookahead_jax.model.params import abstract_params, unstack
from lookahead_jax.modules.definition import TARGETS, LookaheadConfig, init_modules
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.train.objective import lookahead_loss
from tests import tiny

pytestmark = pytest.mark.slow

M, Y = 8, 40
SIZES = LookaheadConfig(tokens=M, rank=2, alpha=4.0, targets=tuple(TARGETS), init="normal")
SHAPE = dict(hidden_size=64, intermediate_size=192)


@pytest.fixture(autouse=True)
def products_of_xla(monkeypatch):
    """XLA does not count the operations of products of few rows that it does not make itself."""
    monkeypatch.setattr(layers, "takes", lambda *_, **__: False)


def rows(length):
    return jax.ShapeDtypeStruct((1, length), jnp.int32)


def compiled_gradient(model, params, tokens, chunk):
    """Loss and gradient of one row, compiled from shapes."""
    modules = jax.eval_shape(lambda: init_modules(jax.random.key(0), SIZES, model))

    def loss(modules, params, prompts, responses):
        return lookahead_loss(modules, params, prompts, responses, config=model, chunk=chunk).sum()

    step = jax.jit(jax.value_and_grad(loss))
    return step.lower(modules, params, rows(tokens), rows(Y)).compile()


def flops(depth, tokens):
    """Of a forward pass over prompt and response, and of a training step; nothing in a loop."""
    model = tiny.config(num_hidden_layers=depth, **SHAPE)
    params = jax.eval_shape(unstack, abstract_params(model, jnp.float32))
    text = tokens + Y
    forward = hidden_states.lower(params, rows(text), config=model, chunk=text).compile()
    step = compiled_gradient(model, params, tokens, chunk=tokens)
    return np.array([program.cost_analysis()["flops"] for program in (forward, step)])


@pytest.mark.parametrize("tokens", [200, 440])
def test_a_step_costs_one_forward_pass_and_little_more(tokens):
    """Counted for one layer more: XLA drops what the loss does not need of the last layer.

    Attention is counted over whole squares on both sides. Of the forward pass the products of
    prompt queries with response keys are taken off, which a causal one would not make.
    """
    forward, step = flops(2, tokens) - flops(1, tokens)
    model = tiny.config(num_hidden_layers=2, **SHAPE)
    forward -= 4 * model.num_heads * model.head_dim * tokens * Y
    assert forward < step <= (1 + 5 * M / (tokens + Y)) * forward


def test_memory_is_linear_in_the_prompt():
    model = tiny.config(num_hidden_layers=2, **SHAPE)
    params = abstract_params(model, jnp.float32)

    def temporaries(tokens):
        memory = compiled_gradient(model, params, tokens, chunk=128).memory_analysis()
        return memory.temp_size_in_bytes

    # On shorter prompts another part of the step needs most.
    short, middle, long = (temporaries(tokens) for tokens in (2048, 3072, 5120))
    growth = (middle - short) / 1024
    assert abs((long - middle) / 2048 - growth) < 0.05 * growth
    # A token: its keys and values in every layer, the residual stream, targets and predictions.
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    scores = model.num_heads * (model.num_layers + M)
    assert growth < 4 * (kv + 8 * model.hidden_size + scores)
