"""config.json of both generations, defaults, and what is refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.model.config import RopeConfig

MODELS = Path(__file__).parent / "fixtures" / "models"
V4 = sorted(path.parent.name for path in MODELS.glob("*/config_v4.json"))
TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3")
TYPES += ("granite", "glm", "glm4", "mixtral", "qwen3_moe", "gpt_oss")


def read(name, file="config.json"):
    return json.loads((MODELS / name / file).read_text())


@pytest.mark.parametrize("name", V4)
def test_both_generations_agree(name):
    v4, v5 = read(name, "config_v4.json"), read(name)
    assert "rope_parameters" not in v4.get("text_config", v4)
    assert "rope_parameters" in v5.get("text_config", v5)
    assert config_from_hf(v4) == config_from_hf(v5)


@pytest.mark.parametrize("model_type", TYPES)
def test_defaults_are_those_of_transformers(model_type):
    """Values read in transformers 5.23's configuration classes."""
    config = config_from_hf({"model_type": model_type})
    sizes = (config.vocab_size, config.hidden_size, config.mlp_dim, config.num_layers)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim, config.max_position)
    assert (sizes, heads) == {
        "llama": ((32000, 4096, 11008, 32), (32, 32, 128, 2048)),
        "mistral": ((32000, 4096, 14336, 32), (32, 8, 128, 131072)),
        "qwen2": ((151936, 4096, 22016, 32), (32, 32, 128, 32768)),
        "qwen3": ((151936, 4096, 22016, 32), (32, 32, 128, 32768)),
        "gemma2": ((256000, 2304, 9216, 26), (8, 4, 256, 8192)),
        "gemma3_text": ((262208, 2304, 9216, 26), (8, 4, 256, 131072)),
        "phi3": ((32064, 3072, 8192, 32), (32, 32, 96, 4096)),
        "glm": ((151552, 4096, 13696, 40), (32, 2, 128, 131072)),
        "glm4": ((151552, 4096, 13696, 40), (32, 2, 128, 131072)),
        "granite": ((32000, 4096, 11008, 32), (32, 32, 128, 2048)),
        "smollm3": ((128256, 2048, 11008, 36), (16, 4, 128, 32768)),
        "olmo2": ((50304, 4096, 11008, 32), (32, 32, 128, 2048)),
        "mixtral": ((32000, 4096, 14336, 32), (32, 8, 128, 131072)),
        "qwen3_moe": ((151936, 2048, 768, 24), (32, 4, 64, 32768)),
        "gpt_oss": ((201088, 2880, 2880, 36), (64, 8, 64, 131072)),
    }[model_type]
    other_eps = dict.fromkeys(("phi3", "olmo2", "mixtral", "gpt_oss"), 1e-5)
    other_eps |= {"glm": 1.5625e-7, "glm4": 1.5625e-7}
    assert config.norm_eps == other_eps.get(model_type, 1e-6)
    assert config.ropes[0].dim == (64 if model_type[:3] == "glm" else config.head_dim)
    assert config.tie_embeddings == (model_type[:5] in ("gemma", "smoll"))
    thetas = tuple(rope.theta for rope in config.ropes)
    other_thetas = {"gemma3_text": (1e6, 1e4), "smollm3": (2e6, 2e6), "mixtral": (1e6,)}
    other_thetas |= {"gpt_oss": (150_000.0,)}
    assert thetas == other_thetas.get(model_type, (1e4,))
    mixed = {
        "mixtral": (8, 2, True, False, None),
        "qwen3_moe": (128, 8, False, False, None),
        "gpt_oss": (128, 4, True, True, (1.702, 7.0)),
    }.get(model_type)
    assert mixed == (config.experts and dataclasses.astuple(config.experts))


def test_the_published_gpt_oss_20b():
    """The fields of its config.json that transformers 4 wrote."""
    config = config_from_hf(
        {
            "model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32,
            "experts_per_token": 4, "initial_context_length": 4096, "swiglu_limit": 7.0,
            "layer_types": ["sliding_attention", "full_attention"] * 12, "rope_theta": 150000,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                "original_max_position_embeddings": 4096, "truncate": False,
            },
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        }
    )  # fmt: skip
    assert config.layer_window == (128, None) * 12
    assert (config.qkv_bias, config.o_bias, config.attn_sinks) == (True,) * 3
    rope = config.ropes[0]
    assert (rope.kind, rope.factor, rope.theta, rope.truncate) == ("yarn", 32.0, 150_000.0, False)


def test_windows():
    mistral = config_from_hf({"model_type": "mistral", "num_hidden_layers": 2})
    assert mistral.layer_window == (4096, 4096)
    nowhere = {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None}
    assert config_from_hf(nowhere).layer_window == (None, None)
    qwen = {"model_type": "qwen2", "num_hidden_layers": 3, "max_window_layers": 2}
    assert config_from_hf(qwen).layer_window == (None,) * 3
    windowed = qwen | {"use_sliding_window": True, "sliding_window": 7}
    assert config_from_hf(windowed).layer_window == (None, None, 7)
    gemma2 = config_from_hf({"model_type": "gemma2", "num_hidden_layers": 3})
    assert gemma2.layer_window == (4096, None, 4096)
    gemma3 = {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 5}
    assert config_from_hf(gemma3).layer_window == (5, 5, 5, 5, 5, None, 5)
    assert config_from_hf(gemma3).layer_rope == (1, 1, 1, 1, 1, 0, 1)
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        three = config_from_hf(gemma3 | {name: 3})
        assert three.layer_window == (5, 5, None, 5, 5, None, 5)


def test_multipliers_of_granite():
    fields = read("granite")
    config = config_from_hf(fields)
    assert (config.embed_scale, config.residual_scale) == (3.0, 0.6)
    assert (config.attn_scale, config.logit_divisor) == (0.5, 1.5)
    absent = {"model_type": "granite"}
    assert config_from_hf(absent).attn_scale == 1.0  # not 1 / sqrt(head_dim)


def test_layers_without_rope():
    smollm3 = {"model_type": "smollm3", "num_hidden_layers": 5}
    config = config_from_hf(smollm3)
    assert [rope.kind for rope in config.ropes] == ["default", "none"]
    assert config.layer_rope == (0, 0, 0, 1, 0)
    assert config.layer_window == (None,) * 5
    assert config_from_hf(smollm3 | {"no_rope_layer_interval": 2}).layer_rope == (0, 1, 0, 1, 0)
    listed = smollm3 | {"no_rope_layers": [0, 1, 1, 0, 1], "no_rope_layer_interval": 2}
    assert config_from_hf(listed).layer_rope == (1, 0, 0, 1, 0)
    windowed = listed | {"use_sliding_window": True, "sliding_window": 7}
    assert config_from_hf(windowed).layer_window == (7, None, None, 7, None)


def test_nested_gemma3_omitting_its_defaults():
    """The shape of the 4B checkpoint's config.json."""
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "model_type": "gemma3_text"}
    config = config_from_hf({"model_type": "gemma3", "text_config": text})
    assert config.model_type == "gemma3_text"
    assert config.hidden_size == 2560
    assert config.ropes[0].kind == "linear"
    assert config.ropes[0].factor == 8.0
    assert config.ropes[1] == RopeConfig(kind="default", theta=1e4, dim=256, max_position=131072)
    assert config.tie_embeddings
    assert config.embed_scale == 2560**0.5


def test_stale_hidden_act_of_gemma_is_ignored():
    config = config_from_hf({"model_type": "gemma2", "hidden_act": "relu"})
    assert config.activation == "gelu_tanh"


def test_legacy_phi3_rope_types():
    fields = {"model_type": "phi3", "max_position_embeddings": 8192}
    for kind in ("su", "yarn", "longrope"):
        scaling = {"type": kind, "short_factor": [1.0] * 48, "long_factor": [2] * 48}
        rope = config_from_hf(fields | {"rope_scaling": scaling}).ropes[0]
        assert rope.kind == "longrope"
        assert rope.original_max_position == 4096
        assert rope.factor == 2.0
        assert rope.long_factor == (2.0,) * 48


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "dbrx"}, "unknown model_type 'dbrx'"),
        ({"model_type": None}, "unknown model_type None"),
        ({}, "unknown model_type None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "relu"}, "unknown hidden_act 'relu'"),
        ({"rope_scaling": {"type": "ntk"}}, "unknown rope_type 'ntk'"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "unknown rope_type 'mrope'"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "factor must be of type float"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "out of range"),
        ({"rope_scaling": [1]}, "rope_scaling must be of type Mapping"),
        ({"rope_parameters": {"full_attention": {}}}, "per layer type"),
        ({"rope_scaling": {"type": "none"}}, "unknown rope_type 'none'"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers must hold"),
        ({"model_type": "smollm3", "no_rope_layers": [2] * 36}, "no_rope_layers must hold"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ({"model_type": "granite", "residual_multiplier": 0}, "residual_scale must be positive"),
        ({"model_type": "granite", "attention_multiplier": 0}, "attn_scale must be positive"),
        ({"model_type": "granite", "logits_scaling": "8"}, "logits_scaling must be of type float"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_attention_heads": 3}, "not whole"),
        ({"num_attention_heads": 0}, "not whole"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_key_value_heads": -4}, "num_kv_heads must be positive"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is out of range"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be of type int, got 2.0"),
        ({"model_type": []}, r"unknown model_type \[\]"),
        ({"model_type": {"a": 1}}, "unknown model_type {'a': 1}"),
        ({"model_type": "mistral", "sliding_window": 10**14}, "sliding_window is out of range"),
        ({"model_type": "mistral", "sliding_window": 1e9}, "sliding_window must be of type int"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings is out of range"),
        ({"hidden_size": "4096"}, "hidden_size must be of type int"),
        ({"hidden_size": True}, "hidden_size must be of type int"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": -1}, "vocab_size must be positive"),
        ({"head_dim": 7}, "cannot rotate 7"),
        ({"model_type": "mistral", "sliding_window": 0}, "windows must be positive"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 26}, "layer_types"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window is missing"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 0.0}, "attn_softcap must be positive"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1}, "final_softcap must be posit"),
        ({"rms_norm_eps": -1e-6}, "norm_eps must not be negative"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "softcapping is 50.0"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}}, "nested"),
        ({"model_type": "gemma3"}, "text_config is missing"),
        ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, "model_type 'llama'"),
    ],
)
def test_refused_by_name(fields, message):
    base = {} if "model_type" in fields or not fields else {"model_type": "llama"}
    with pytest.raises(ValueError, match=message):
        config_from_hf(base | fields)


def test_ministral_windows_differ_by_layer():
    fields = read("ministral")
    assert config_from_hf(fields).layer_window == (8, None, 8)
    # Published as mistral with layer_types, which transformers reads as ministral.
    assert config_from_hf(fields | {"model_type": "mistral"}) == config_from_hf(fields)
    assert config_from_hf(fields | {"layer_types": None}).layer_window == (8, 8, 8)


SLIDING, FULL = ["sliding_attention"] * 2, ["full_attention"] * 2


@pytest.mark.parametrize(
    ("model_type", "fields", "refused"),
    [
        ("llama", {"layer_types": SLIDING, "sliding_window": 8}, "layer_types"),
        ("llama", {"layer_types": FULL}, None),
        ("llama", {"sliding_window": 8}, "sliding_window"),
        ("llama", {"sliding_window": 8, "use_sliding_window": False}, None),
        ("llama", {"sliding_window": 2048, "max_window_layers": 1}, None),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("llama", {"query_pre_attn_scalar": 100, "head_dim": 128}, "query_pre_attn_scalar"),
        ("llama", {"query_pre_attn_scalar": 128, "head_dim": 128}, None),
        ("llama", {"rope_local_base_freq": 1e6}, "rope_local_base_freq"),
        ("llama", {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("llama", {"embedding_multiplier": 1.0, "num_experts": 0, "use_qk_norm": False}, None),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"no_rope_layer_interval": 4}, "no_rope_layer_interval"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"is_causal": True, "rotary_pct": 1.0, "num_kv_shared_layers": 0}, None),
        ("llama", {"qk_norm": True}, "qk_norm"),
        ("llama", {"alibi": True}, "alibi"),
        ("mistral", {"rope_interleaved": True}, "rope_interleaved"),
        ("mistral", {"attn_temperature_tuning": True}, "attn_temperature_tuning"),
        ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("qwen2", {"layer_types": SLIDING}, "use_sliding_window is false"),
        ("qwen2", {"layer_types": SLIDING, "use_sliding_window": True}, None),
        ("qwen3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("mistral", {"use_sliding_window": False}, "use_sliding_window"),
        ("mistral", {"use_sliding_window": True}, None),
        ("mistral", {"use_sliding_window": False, "sliding_window": None}, None),
        ("mistral", {"max_window_layers": 1}, "max_window_layers"),
        ("mixtral", {"sliding_window": 8, "num_local_experts": 4}, None),
        ("mixtral", {"num_experts_per_tok": 3, "num_local_experts": 2}, "3 of 2 experts"),
        ("mixtral", {"num_local_experts": 0}, "2 of 0 experts"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts 1000000 exceeds"),
        ("mixtral", {"layer_types": SLIDING}, "layer_types"),
        ("qwen3_moe", {"sliding_window": 8, "max_window_layers": 1, "num_experts": 16}, None),
        ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True}, None),
        ("qwen3_moe", {"swiglu_limit": 7.0}, "swiglu_limit"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu alpha and limit must be positive"),
        ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; models in which"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; models in which"),
        ("mistral", {"sliding_window_pattern": 2}, "sliding_window_pattern"),
        ("phi3", {"layer_types": SLIDING}, "layer_types"),
        ("phi3", {"layer_types": SLIDING, "sliding_window": 8}, None),
        ("phi3", {"layer_types": FULL, "sliding_window": 8}, "layer_types"),
        ("gemma2", {"sliding_window_pattern": 2}, None),
        ("gemma2", {"sliding_window_pattern": 6}, "sliding_window_pattern"),
        ("gemma2", {"rope_local_base_freq": 1e6}, "rope_local_base_freq"),
        ("olmo2", {"sliding_window": 8, "layer_types": SLIDING}, "layer_types"),  # OLMo 3
        ("olmo2", {"sliding_window": 8}, "sliding_window"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmo2", {"residual_multiplier": 0.22}, "residual_multiplier"),
        ("mistral", {"attention_multiplier": 0.1}, "attention_multiplier"),
        ("granite", {"num_local_experts": 8}, "num_local_experts"),
        ("granite", {"num_local_experts": 0}, None),
        ("smollm3", {"layer_types": SLIDING, "sliding_window": 8}, "use_sliding_window is false"),
        ("glm4", {"sliding_window": 8}, "sliding_window"),
        ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("smollm3", {"max_window_layers": 28, "use_sliding_window": False}, None),
        ("qwen3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ],
)
def test_fields_of_other_families(model_type, fields, refused):
    """A field that has an effect and would be ignored is refused; neutral values are not."""
    fields = {"model_type": model_type, "num_hidden_layers": 2, **fields}
    if refused is None:
        config_from_hf(fields)
    else:
        with pytest.raises(ValueError, match=refused):
            config_from_hf(fields)


def test_config_is_hashable_and_equal_by_value():
    one, two = (config_from_hf(read("phi3")) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)


NAMES = ("llama3", "gemma3_text", "smollm3_window", "granite", "glm4", "qwen3_moe", "gpt_oss")
KEYS = sorted({"rope_scaling", "rope_theta"}.union(*map(read, NAMES)))
VALUES = [None, True, -1, 0, 1, 2, 7, 64, 10**400, 0.5, -2.0, float("nan"), float("inf"), "", "x"]
VALUES += [[], [1.0], [[]], [None], ["full_attention"] * 2, {}, {"full_attention": {"factor": 2}}]
ROPE = st.dictionaries(
    st.sampled_from(["rope_theta", "factor", "short_factor", "original_max_position_embeddings"]),
    st.sampled_from(VALUES),
)
KINDS = st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope", "x", 3])
JSON = st.sampled_from(VALUES) | st.builds(lambda rope, kind: rope | {"type": kind}, ROPE, KINDS)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(TYPES), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_json_parses_or_raises_value_error(model_type, fields):
    try:
        config = config_from_hf(fields | {"model_type": model_type})
    except ValueError:
        return
    assert config.num_heads % config.num_kv_heads == 0
