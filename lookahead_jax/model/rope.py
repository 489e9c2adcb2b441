"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with every scaling in use.

Frequencies of `dynamic` and `longrope` depend on the length of the text. Keys are cached rotated,
so each row has one set of frequencies, chosen from its span. The span is the number of tokens that
are known when the row is first read: its own prompt, plus what will be read after it in the same
call (a question; the continuation that is scored). Padding, other rows and tokens that are yet to
be generated do not count, so the first new token is that of transformers, whatever max_new_tokens.

A row that grows past `rope_boundary` keeps its frequencies, and public functions warn about it.
transformers then reads the whole text again with the long factors (longrope), or rotates only the
new tokens with the new frequencies (dynamic); an evicted cache cannot be read again.
"""
# RopeConfig has checked that the fields its kind uses are not None, which no annotation can say.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lookahead_jax.model.config import ModelConfig, RopeConfig


def inverse_frequencies(
    rope: RopeConfig, span: Int[Array, " B"]
) -> tuple[Float[Array, "B half"], Float[Array, " B"]]:
    """Radians per position of each rotated pair, and the factor on cosines and sines, per row.

    Sources, by kind: `linear` position interpolation (arXiv:2306.15595); `dynamic` NTK-aware
    theta, which grows once span exceeds `max_position`; `yarn` arXiv:2309.00071, with the attention
    factor 0.1 ln(factor) + 1 or, given both mscales, the ratio of theirs; `longrope`
    arXiv:2402.13753, long factors where span exceeds `original_max_position`; `llama3` the
    smoothed interpolation of Llama 3.1. `none` has frequencies 0: rotating changes nothing.

    Returns:
      float32 [B, dim / 2] and float32 [B].
    """
    rows = span.shape[0]
    # Constants are computed in float64 on the host and rounded once.
    exponents = np.arange(0, rope.dim, 2) / rope.dim
    plain = rope.theta**-exponents
    attention_factor = 1.0
    match rope.kind:
        case "default":
            frequencies = _rows(plain, rows)
        case "none":
            frequencies = _rows(0.0 * plain, rows)
        case "linear":
            frequencies = _rows(plain / rope.factor, rows)
        case "dynamic":
            frequencies = _rows(plain, rows) * _dynamic_factor(rope, exponents, span)
        case "llama3":
            frequencies = _rows(_llama3(rope, plain), rows)
        case "yarn":
            frequencies = _rows(_yarn(rope, plain), rows)
            attention_factor = _yarn_attention_factor(rope)
        case "longrope":
            short, long = plain / np.array(rope.short_factor), plain / np.array(rope.long_factor)
            is_long = (span > rope.original_max_position)[:, None]
            frequencies = jnp.where(is_long, _rows(long, rows), _rows(short, rows))
            attention_factor = _longrope_attention_factor(rope)
    return frequencies, jnp.full((rows,), attention_factor, jnp.float32)


def rope_tables(
    config: ModelConfig, positions: Int[Array, "B P"], span: Int[Array, " B"]
) -> tuple[Float[Array, "ropes B P half"], Float[Array, "ropes B P half"]]:
    """Cosines and sines of every rope of the model at `positions`, attention factor included.

    A position of -1 (padding) yields finite values that nothing may use.

    Returns:
      Two float32 arrays [ropes, B, P, dim / 2].
    """
    cos, sin = [], []
    for rope in config.ropes:
        frequencies, attention_factor = inverse_frequencies(rope, span)
        angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :]
        cos.append(jnp.cos(angles) * attention_factor[:, None, None])
        sin.append(jnp.sin(angles) * attention_factor[:, None, None])
    return jnp.stack(cos), jnp.stack(sin)


def rope_boundary(config: ModelConfig) -> int | None:
    """The longest span with the same frequencies as span 1; None if they never depend on it."""
    lengths = [
        rope.original_max_position if rope.kind == "longrope" else rope.max_position
        for rope in config.ropes
        if rope.kind in ("longrope", "dynamic")
    ]
    return min((n for n in lengths if n is not None), default=None)


def span_class(config: ModelConfig, span: int) -> int:
    """A number that is equal for spans with the same frequencies: what a cached prompt depends on.

    The boundary for all spans up to it, else the span itself.
    """
    boundary = rope_boundary(config)
    return 0 if boundary is None else max(span, boundary)


def apply_rope(
    x: Float[Array, "B P heads H"],
    cos: Float[Array, "B P half"],
    sin: Float[Array, "B P half"],
    *,
    interleaved: bool,
) -> Float[Array, "B P heads H"]:
    """Rotates dimension i with i + half for i < half, in float32; leaves dimensions >= 2 half.

    If `interleaved` (`ModelConfig.rope_interleaved`), it rotates dimension 2i with 2i + 1. Both
    are pairings of Hugging Face checkpoints. The result has x's dtype.
    """
    half = cos.shape[-1]
    if interleaved:
        pairs = x[..., : 2 * half].astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        rotated = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * half)
    else:
        rotated = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * half :]], axis=-1)


def _rows(frequencies: np.ndarray, rows: int) -> jax.Array:
    """[dim / 2] -> float32 [B, dim / 2]."""
    return jnp.broadcast_to(frequencies.astype(np.float32), (rows, frequencies.shape[0]))


def _dynamic_factor(rope: RopeConfig, exponents: np.ndarray, span: jax.Array) -> jax.Array:
    """Factor on each frequency of replacing theta by theta * stretch ** (dim / (dim - 2))."""
    length = jnp.maximum(span, rope.max_position).astype(jnp.float32)
    stretch = rope.factor * length / rope.max_position - (rope.factor - 1.0)
    powers = (-exponents * rope.dim / (rope.dim - 2)).astype(np.float32)
    return stretch[:, None] ** powers[None, :]


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are interpolated, short ones kept, those between blended linearly."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (keep + (1.0 - keep) / rope.factor)


def _yarn(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Dimensions that turn more than beta_fast times are kept, less than beta_slow interpolated."""

    def dimension(turns: float) -> float:
        ratio = rope.original_max_position / (turns * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001  # as the reference implementation avoids dividing by zero
    interpolate = np.clip((np.arange(rope.dim // 2) - low) / width, 0.0, 1.0)
    return plain * (1.0 - interpolate + interpolate / rope.factor)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1.0 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(rope.factor) / math.log(rope.original_max_position))
