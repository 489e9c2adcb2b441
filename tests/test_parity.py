"""Logits of every family against transformers' (tests/fixtures/make_fixtures.py made them).

The tolerance is the project's: float32, error at most 1e-5 of the largest logit.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.load import load
from lookahead_jax.model import decoder as lm
from lookahead_jax.model.params import unstack

MODELS = Path(__file__).parent / "fixtures" / "models"
NAMES = sorted(path.name for path in MODELS.iterdir())


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params, tokens, *, config):
    """Logits [B, T, V] of whole sequences, each row opened for exactly its own length."""
    valid = tokens >= 0
    positions = jnp.where(valid, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], -1)
    block = lm.Block(
        x=lm.embed(params, tokens, config=config),
        positions=positions,
        rope_span=valid.sum(-1, dtype=jnp.int32),
    )
    hidden = lm.forward(params, block, None, config=config).hidden
    return lm.logits(params, hidden, config=config)


def golden(name):
    """Tokens [B, T] padded with -1, and the list of each row's logits [length, V]."""
    with np.load(MODELS / name / "golden.npz") as file:
        tokens, logits = file["tokens"], file["logits"]
    lengths = (tokens >= 0).sum(-1)
    return tokens, np.split(logits, np.cumsum(lengths)[:-1])


def error(got, expected):
    """Largest error, relative to the largest logit."""
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


pytestmark = pytest.mark.filterwarnings("ignore:.*config.json ties lm_head:UserWarning")


@functools.cache
def loaded(name):
    return load(MODELS / name)


@pytest.mark.parametrize("name", NAMES)
def test_ragged_rows_together_and_alone(name):
    """Alone: the other rows of the batch are empty."""
    model = loaded(name)
    tokens, expected = golden(name)
    together = full_logits(model.params, tokens, config=model.config)
    assert together.dtype == jnp.float32
    for row, logits in enumerate(expected):
        only = np.where(np.arange(len(tokens))[:, None] == row, tokens, -1)
        alone = full_logits(model.params, only, config=model.config)
        for got in (together, alone):
            assert error(got[row, : len(logits)], logits) <= 1e-5


# Together they have every kind of layer: windows, sinks, experts, layers without RoPE, factors that
# depend on a row's length, norms after the sublayers, biases.
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "phi3", "qwen3_moe", "smollm3"])
def test_batches_of_one_with_unstacked_layers(name):
    model = loaded(name)
    params = unstack(model.params)
    tokens, expected = golden(name)
    for row, logits in enumerate(expected):
        got = full_logits(params, tokens[row : row + 1], config=model.config)
        assert error(got[0, : len(logits)], logits) <= 1e-5


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("mistral", "sliding_window", 9),
        ("gemma3_text", "query_pre_attn_scalar", 12.01),
        ("gemma2", "attn_logit_softcapping", 5.01),
        ("phi3", "original_max_position_embeddings", 64),
        ("qwen2", "rms_norm_eps", 1e-3),
        ("smollm3", "no_rope_layers", [1, 1, 1, 1]),
        ("granite", "residual_multiplier", 0.601),
        ("glm4", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.34}),
        ("mixtral", "num_experts_per_tok", 3),
        ("qwen3_moe", "norm_topk_prob", False),
        ("gpt_oss", "swiglu_limit", 1.6),
        ("gpt_oss", "swiglu_alpha", 1.8),
    ],
)
def test_a_wrong_constant_fails(name, field, value):
    """The comparison is sharp: a slightly different model is outside the tolerance."""
    hf = json.loads((MODELS / name / "config.json").read_text())
    config = config_from_hf(hf | {field: value})
    tokens, expected = golden(name)
    got = full_logits(loaded(name).params, tokens, config=config)
    assert error(got[0, : len(expected[0])], expected[0]) > 1e-4


@pytest.mark.parametrize(
    ("name", "tolerance"), [("llama3", 0.05), ("olmo2", 0.05), ("granite", 0.05), ("glm4", 0.1)]
)
def test_bfloat16_is_close(name, tolerance):
    """Bfloat16 keeps 8 bits; two layers stay within a few of its roundings (2^-8 = 0.004).

    transformers in bfloat16 is off by 0.036, 0.017, 0.020 and 0.079.
    """
    model = load(MODELS / name, dtype="bfloat16")
    tokens, expected = golden(name)
    got = full_logits(model.params, tokens, config=model.config)
    assert error(got[0, : len(expected[0])], expected[0]) <= tolerance
