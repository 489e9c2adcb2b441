"""Small random models and prompts for the tests."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.load import save_params
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.sampling import Sampling, TextSoFar, process_logits, sampling_rows
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params, init_params
from lookahead_jax.policies.base import Policy
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.prompts.read import read_prompt

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
NEEDS_SETTINGS = ("kvzap", "incremental")  # policies without default settings
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 24}


@functools.cache
def config(**overrides) -> ModelConfig:
    """A tiny Llama; fields of its config.json can be replaced."""
    return config_from_hf({**LLAMA, **overrides})


@functools.cache
def params(model: ModelConfig, seed: int = 0) -> Params:
    """Random float32 weights whose attention and logits are far from flat."""
    weights = init_params(jax.random.key(seed), model, jnp.float32)
    sharper = {"q": 3.0, "k": 3.0}
    layers = {name: w * sharper.get(name, 1.0) for name, w in weights["layers"].items()}
    return {**weights, "embed": weights["embed"] * 5.0, "layers": layers}


def model_folder(folder: Path, **overrides) -> ModelConfig:
    """Writes a random Llama as a checkpoint; its configuration."""
    model = config(**overrides)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **overrides}))
    save_params(folder, params(model), model)
    return model


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


def byte_pair(
    pieces: list[str], merged: Sequence[str] = (), special: Sequence[str] = ()
) -> Tokenizer:
    """A byte-level tokenizer of these characters of its alphabet, ids in their order.

    It has further tokens for the texts `merged` and for all their beginnings.
    """
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary, merges = {piece: i for i, piece in enumerate(pieces)}, []
    for text in merged:
        whole = "".join(piece for piece, _ in level.pre_tokenize_str(text))
        for end in range(2, len(whole) + 1):
            if whole[:end] not in vocabulary:
                vocabulary[whole[:end]] = len(vocabulary)
                merges.append((whole[: end - 1], whole[end - 1]))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = level, tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend=backend, special_tokens={}, chat_templates={})


CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def save_chat_model(folder: Path, template: str = CHAT, **overrides) -> None:
    """As `save_bytes_model`, with a chat template and its two control tokens, 256 and 257.

    It writes visible ASCII only, so that a text of its own has the tokens that it wrote.
    """
    overrides = {"vocab_size": 258, **overrides}
    save_bytes_model(folder, **overrides)
    model = config(**overrides)
    weights = params(model)
    visible = (jnp.arange(258) < 94)[:, None]
    embed = jnp.where(visible, weights["embed"], weights["embed"] * 0.01)
    save_params(folder, {**weights, "embed": embed}, model)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": template, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))


def prompts(lengths: tuple[int, ...], seed: int = 0, vocab: int = 97) -> list[list[int]]:
    """Random rows of the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def batch(lengths: tuple[int, ...], model: ModelConfig, seed: int = 0) -> jax.Array:
    """Random rows, padded."""
    return jnp.asarray(pad_batch(prompts(lengths, seed, model.vocab_size), config=model))


def assert_tokens_match(tokens: np.ndarray, other: np.ndarray, logits: np.ndarray) -> int:
    """Rows of tokens [B, W] are equal up to near-ties; returns how many rows end in one.

    `logits` [B, W, V] are those that chose `tokens`.
    """
    rows = zip(tokens.tolist(), other.tolist(), logits, strict=True)
    return sum(
        not same_tokens(theirs, mine, lambda before, row=row: row[len(before)])
        for mine, theirs, row in rows
    )


def same_tokens(
    tokens: list[int],
    other: list[int],
    scores: Callable[[list[int]], np.ndarray],
    *,
    tie: float = 1e-5,
) -> bool:
    """Whether two runs emitted the same; if not, it must have been a near-tie.

    Where two runs group their sums differently, float32 rounds differently: at the first
    difference both must have chosen among the best of `scores(before)` [V], by less than
    `tie` of the largest; what follows it is another text. `before` are the tokens that both have.
    """
    at = next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
    if at is None:
        assert len(tokens) == len(other)
        return True
    values = scores(other[:at])
    largest = np.abs(values[np.isfinite(values)]).max()
    margin = (values.max() - values[[tokens[at], other[at]]].min()) / largest
    assert margin < tie, f"step {at}: {tokens[at]} != {other[at]}, margin {margin:.1e}"
    return False


def decision(
    params: Params,
    model: ModelConfig,
    prompt: list[int],
    emitted: list[int],
    *,
    policy: Policy,
    budget: int,
    sampling: Sampling,
    seed: int,
    new_tokens: int,
    cache_dtype: str | None = None,
) -> np.ndarray:
    """The scores [V] of which the token after `emitted` is the largest: `scores` of same_tokens.

    One row by itself; `new_tokens` are those of the run, and no fewer than `emitted`.
    """
    read = read_prompt(
        params, jnp.asarray(pad_batch([prompt], config=model)), config=model, policy=policy,
        budget=budget, new_tokens=new_tokens, cache_dtype=cache_dtype,
    )  # fmt: skip
    cache, logits = read.cache, read.logits
    if emitted:
        fed = np.full((1, new_tokens), -1, np.int32)
        fed[0, : len(emitted)] = emitted
        _, logits = extend(params, jnp.asarray(fed), cache, config=model)
    seen = np.zeros((1, model.vocab_size), bool)
    seen[0, prompt + emitted] = True
    counts = np.bincount(np.asarray(emitted, int), minlength=model.vocab_size)[None]
    text = TextSoFar(jnp.asarray(seen), jnp.asarray(counts, jnp.int32))
    rows = sampling_rows([sampling], [seed], model.vocab_size)
    processed = jax.jit(process_logits)(logits[:, None], text, rows)[0, 0]
    if sampling.temperature == 0:
        return np.asarray(processed)
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), len(prompt) + len(emitted))
    return np.asarray(processed + jax.random.gumbel(key, processed.shape, jnp.float32))
