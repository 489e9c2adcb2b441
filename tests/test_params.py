"""The table of parameters: shapes, init, checkpoint layout, fingerprint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.stored_layout import (
    from_stored,
    stored_index,
    stored_shape,
    to_checkpoint,
)
from lookahead_jax.model import params as P
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.parameter_specs import parameter_specs
from tests.compilations import compilations

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "partial_rotary_factor": 1.0,  # half of 6 is not even
}
TYPES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "glm4", "mixtral")
TYPES += ("qwen3_moe", "gpt_oss")


def make(model_type, **fields):
    config = config_from_hf(SIZES | {"model_type": model_type} | fields)
    return config, P.init_params(jax.random.key(0), config, jnp.float32)


def test_shapes_of_a_model_with_everything():
    config, params = make("llama", attention_bias=True, mlp_bias=True)
    L, D, N, K, H, F, V = 3, 24, 4, 2, 6, 36, 40
    shapes = jax.tree.map(lambda a: a.shape, params, is_leaf=lambda a: hasattr(a, "shape"))
    assert shapes == {
        "embed": (V, D),
        "final_norm": (D,),
        "lm_head": (V, D),
        "layers": {
            "attn_norm": (L, D),
            "q": (L, D, N, H),
            "k": (L, D, K, H),
            "v": (L, D, K, H),
            "o": (L, N, H, D),
            "q_bias": (L, N, H),
            "k_bias": (L, K, H),
            "v_bias": (L, K, H),
            "o_bias": (L, D),
            "mlp_norm": (L, D),
            "gate": (L, D, F),
            "up": (L, D, F),
            "down": (L, F, D),
            "gate_bias": (L, F),
            "up_bias": (L, F),
            "down_bias": (L, D),
        },
    }
    abstract = P.abstract_params(config, jnp.float32)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )


@pytest.mark.parametrize(
    ("model_type", "present", "absent"),
    [
        ("qwen2", {"q_bias", "k_bias", "v_bias"}, {"o_bias", "q_norm", "attn_post_norm"}),
        ("qwen3", {"q_norm", "k_norm"}, {"q_bias", "attn_post_norm"}),
        ("gemma2", {"attn_post_norm", "mlp_post_norm"}, {"q_norm", "q_bias"}),
        ("gemma3_text", {"attn_post_norm", "q_norm"}, {"q_bias"}),
        ("glm4", {"attn_post_norm", "mlp_norm", "q_bias"}, {"o_bias", "q_norm"}),
        ("olmo2", {"attn_post_norm", "mlp_post_norm", "k_norm"}, {"attn_norm", "mlp_norm"}),
    ],
)
def test_optional_parameters(model_type, present, absent):
    _, params = make(model_type)
    assert present <= params["layers"].keys()
    assert not absent & params["layers"].keys()
    assert ("lm_head" in params) == (not model_type.startswith("gemma"))


def test_init_is_scaled_by_fan_in():
    config, params = make("llama", hidden_size=64, intermediate_size=256, vocab_size=512)
    for name, fan_in in (("q", 64), ("o", 4 * 6), ("gate", 64), ("down", 256)):
        # At least 3 * 1536 draws: the deviation of a standard deviation is below 1 %.
        np.testing.assert_allclose(params["layers"][name].std(), fan_in**-0.5, rtol=0.05)
    np.testing.assert_allclose(params["embed"].std(), 64**-0.5, rtol=0.05)
    np.testing.assert_array_equal(params["layers"]["attn_norm"], 1.0)
    _, gemma = make("gemma2")
    np.testing.assert_array_equal(gemma["layers"]["attn_norm"], 0.0)
    again = P.init_params(jax.random.key(0), config, jnp.float32)
    np.testing.assert_array_equal(again["layers"]["q"], params["layers"]["q"])


def test_fused_tensors_of_phi3():
    config, params = make("phi3")
    tensors = to_checkpoint(params, config)
    fused = tensors["model.layers.1.self_attn.qkv_proj.weight"]
    q, k, v = (np.asarray(params["layers"][n][1]).reshape(24, -1).T for n in "qkv")
    np.testing.assert_array_equal(fused, np.concatenate([q, k, v]))
    fused = tensors["model.layers.1.mlp.gate_up_proj.weight"]
    gate, up = (np.asarray(params["layers"][n][1]).T for n in ("gate", "up"))
    np.testing.assert_array_equal(fused, np.concatenate([gate, up]))
    assert not any("q_proj" in name or "up_proj" in name.split("gate_")[0] for name in tensors)


def test_norms_of_gemma_have_their_own_names():
    config, params = make("gemma2")
    params["layers"]["mlp_norm"] = jnp.full((3, 24), 7.0, jnp.float32)
    params["layers"]["attn_post_norm"] = jnp.full((3, 24), 8.0, jnp.float32)
    tensors = to_checkpoint(params, config)
    assert (tensors["model.layers.0.pre_feedforward_layernorm.weight"] == 7).all()
    assert (tensors["model.layers.0.post_attention_layernorm.weight"] == 8).all()


def test_norms_of_glm4_have_their_own_names():
    config, params = make("glm4")
    params["layers"]["mlp_norm"] = jnp.full((3, 24), 7.0, jnp.float32)
    params["layers"]["attn_post_norm"] = jnp.full((3, 24), 8.0, jnp.float32)
    params["layers"]["mlp_post_norm"] = jnp.full((3, 24), 9.0, jnp.float32)
    tensors = to_checkpoint(params, config)
    assert (tensors["model.layers.0.post_attention_layernorm.weight"] == 7).all()
    assert (tensors["model.layers.0.post_self_attn_layernorm.weight"] == 8).all()
    assert (tensors["model.layers.0.post_mlp_layernorm.weight"] == 9).all()
    assert tensors["model.layers.0.mlp.gate_up_proj.weight"].shape == (2 * 36, 24)


CHECKPOINTS = {}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slice_of_any_parameter_comes_back(data):
    """What sharded loading does: read the covering slice, cut out the asked one."""
    model_type = data.draw(st.sampled_from(TYPES))
    if model_type not in CHECKPOINTS:
        config, params = make(model_type)
        CHECKPOINTS[model_type] = config, params, to_checkpoint(params, config)
    config, params, tensors = CHECKPOINTS[model_type]
    path, spec = data.draw(st.sampled_from(sorted(parameter_specs(config).items())))
    place = (2, 1)[: len(spec.lead)]  # a layer, and an expert
    value = np.asarray(P.leaf(params, path))[place]
    stored = tensors[spec.tensor_at(place)]
    assert stored.shape == stored_shape(spec, config)
    index = []
    for size in value.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    index = tuple(index)
    got = from_stored(spec, config, stored[stored_index(spec, config, index)], index)
    np.testing.assert_array_equal(got, value[index])


def test_unstack():
    _, params = make("qwen3")
    flat = P.unstack(params)
    assert isinstance(flat["layers"], tuple)
    np.testing.assert_array_equal(flat["layers"][2]["gate"], params["layers"]["gate"][2])
    assert P.unstack(flat) is flat
    assert flat["embed"] is params["embed"]


def test_unstacked_parameters_export_alike():
    config, params = make("qwen2")
    stacked, flat = to_checkpoint(params, config), to_checkpoint(P.unstack(params), config)
    assert stacked.keys() == flat.keys()
    for name, value in stacked.items():
        np.testing.assert_array_equal(flat[name], value)


def test_fingerprint_tells_bases_apart_and_nothing_else():
    config, params = make("llama")
    digest = fingerprint(params)
    assert fingerprint(P.unstack(params)) == digest
    before = len(compilations)
    assert fingerprint(jax.tree.map(jnp.copy, params)) == digest
    copied = len(compilations)
    fingerprint(params)
    assert len(compilations) == copied >= before  # host memory is read in place
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert fingerprint(rounded) == digest
    tuned = params | {"layers": params["layers"] | {"up": params["layers"]["up"] * 1.02}}
    assert fingerprint(tuned) != digest
    other = P.init_params(jax.random.key(1), config, jnp.float32)
    assert fingerprint(other) != digest
    swapped = params["layers"] | {"k": params["layers"]["v"], "v": params["layers"]["k"]}
    assert fingerprint(params | {"layers": swapped}) != digest
