"""Small random models and prompts for the tests."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lookahead_jax.batching import pad_batch
from lookahead_jax.checkpoint import save_params
from lookahead_jax.config import ModelConfig
from lookahead_jax.layers import Params
from lookahead_jax.params import init_params

LLAMA = dict(
    model_type="llama",
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=512,
    hidden_act="silu",
    tie_word_embeddings=True,
)
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 24}


@functools.cache
def config(**overrides) -> ModelConfig:
    """A tiny Llama; fields of its config.json can be replaced."""
    return ModelConfig.from_hf({**LLAMA, **overrides})


@functools.cache
def params(model: ModelConfig, seed: int = 0) -> Params:
    """Random float32 weights whose attention and logits are far from flat."""
    weights = init_params(jax.random.key(seed), model, jnp.float32)
    sharper = {"q": 3.0, "k": 3.0}
    layers = {name: w * sharper.get(name, 1.0) for name, w in weights["layers"].items()}
    return {**weights, "embed": weights["embed"] * 5.0, "layers": layers}


def save_bytes_model(folder: Path, **overrides) -> None:
    """A checkpoint folder: a tiny Llama with one token per byte."""
    overrides = {"vocab_size": 256, **overrides}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **overrides}))
    model = config(**overrides)
    save_params(folder, params(model), model)
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(level.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def prompts(lengths: tuple[int, ...], seed: int = 0, vocab: int = 97) -> list[list[int]]:
    """Random rows of the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def batch(lengths: tuple[int, ...], model: ModelConfig, seed: int = 0) -> jax.Array:
    """Random rows, padded."""
    return jnp.asarray(pad_batch(prompts(lengths, seed, model.vocab_size), config=model))


def assert_tokens_match(tokens: np.ndarray, other: np.ndarray, logits: np.ndarray) -> int:
    """Rows of tokens [B, W] are equal up to near-ties; returns how many rows end in one.

    `logits` [B, W, V] are those that chose `tokens`. Where two runs group their sums
    differently, float32 rounds differently: the first difference of a row must be a decision
    whose margin is below 1e-5 of the largest logit; what follows it is another text.
    """
    ties = 0
    for row, mine, theirs in zip(logits, tokens, other, strict=True):
        different = np.flatnonzero(mine != theirs)
        if different.size:
            at = different[0]
            first, second = np.sort(row[at])[::-1][:2]
            margin = (first - second) / np.abs(row[at]).max()
            assert margin < 1e-5, f"step {at}: {mine[at]} != {theirs[at]}, margin {margin:.1e}"
            ties += 1
    return ties
