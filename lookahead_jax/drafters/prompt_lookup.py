"""prompt_lookup: the text that followed an earlier occurrence of the last n-gram (Saxena 2023).

https://github.com/apoorvumang/prompt-lookup-decoding; defaults and choice of the match are those
of `PromptLookupCandidateGenerator` in transformers 5.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from lookahead_jax.decoding.device_drafter import Verified, Weights
from lookahead_jax.decoding.tree import TokenTree, chain
from lookahead_jax.model.config import ModelConfig


@struct.dataclass
class Texts:
    """Prompt and output of each row, without the root."""

    tokens: jax.Array  # [B, S] int32, -1 after the end
    length: jax.Array  # [B] int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Drafts the continuation of the leftmost earlier occurrence of the text's last n-gram.

    The longest n-gram with an earlier occurrence counts. Prompt and output are one text.
    """

    ngram: int = 2
    """Longest n-gram that is looked up."""
    tokens: int = 10
    """Longest continuation that is drafted."""

    weights = None

    def __post_init__(self) -> None:
        if self.ngram < 1 or self.tokens < 1:
            raise ValueError(f"ngram={self.ngram} and tokens={self.tokens} must both be at least 1")

    def init(self, batch: int, room: int, config: ModelConfig) -> Texts:
        return Texts(jnp.full((batch, room), -1, jnp.int32), jnp.zeros(batch, jnp.int32))

    def begin(self, weights: Weights, state: Texts, rows: jax.Array, prompts: jax.Array) -> Texts:
        width = state.tokens.shape[1]
        prompts = prompts[:, :width]
        pad = [(0, 0), (0, width - prompts.shape[1])]
        prompts = jnp.pad(prompts, pad, constant_values=-1)
        return Texts(
            state.tokens.at[rows].set(prompts),
            state.length.at[rows].set((prompts >= 0).sum(1, dtype=jnp.int32)),
        )

    def propose(
        self, weights: Weights, state: Texts, root: jax.Array, nodes: int
    ) -> tuple[Texts, TokenTree]:
        text = _append(state, root[:, None], jnp.ones_like(state.length)).tokens
        drafted = continuation(
            text, state.length + 1, ngram=self.ngram, tokens=min(self.tokens, nodes - 1)
        )
        return state, chain(root, drafted, nodes)

    def update(self, weights: Weights, state: Texts, verified: Verified) -> Texts:
        # The accepted nodes are the old root and all emitted tokens but the new root.
        path = jnp.take_along_axis(verified.tree.tokens, verified.accepted.path, axis=1)
        return _append(state, path, verified.accepted.count)


def _append(state: Texts, tokens: jax.Array, count: jax.Array) -> Texts:
    """Appends the first `count` [B] of `tokens` [B, P] to each text, as far as there is room."""
    step = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    width = state.tokens.shape[1]
    at = jnp.where(step < count[:, None], state.length[:, None] + step, width)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return Texts(
        state.tokens.at[rows, at].set(tokens, mode="drop"),
        jnp.minimum(state.length + count, width),
    )


def continuation(
    text: jax.Array, length: jax.Array, *, ngram: int, tokens: int, least: int = 1
) -> jax.Array:
    """What followed the leftmost earlier occurrence of the text's last n-gram: int32 [B, tokens].

    `text` is int32 [B, S] with -1 from `length` [B] on. The longest n-gram of `least` to `ngram`
    tokens that occurs earlier counts; without one, and past the end of the text, there is -1.
    """
    begin = _begin(text, length, ngram, least)
    at = begin[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    known = (begin >= 0)[:, None] & (at < text.shape[1])
    return jnp.where(known, jnp.take_along_axis(text, jnp.where(known, at, 0), axis=1), -1)


def _begin(text: jax.Array, length: jax.Array, longest: int, least: int) -> jax.Array:
    """Where the text [B, S] continues after an earlier occurrence of its end: [B], -1 if none."""
    width = text.shape[1]
    index = jnp.arange(width, dtype=jnp.int32)[None]
    begin = jnp.full_like(length, -1)
    match = jnp.ones(text.shape, bool)  # [B, S] the n tokens that end here are the text's last n
    for n in range(1, longest + 1):
        wanted = jnp.take_along_axis(text, jnp.maximum(length - n, 0)[:, None], axis=1)
        back = jnp.pad(text, [(0, 0), (n - 1, 0)], constant_values=-1)[:, :width]
        match &= (back == wanted) & (wanted >= 0)
        earlier = match & (index < length[:, None] - 1) & (length > n)[:, None]
        found = earlier.any(1) & (n >= least)
        begin = jnp.where(found, jnp.argmax(earlier, axis=1).astype(jnp.int32) + 1, begin)
    return begin
