"""Texts that a strategy changes between steps: put into the rows, and read by their caches."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.model.params import Params
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.strategies.primitives import replace_text
from lookahead_jax.strategies.rows import Rows

Texts = list[list[int]]  # for each prompt the tokens of its continuation, in its one row


def prompt_lengths(side: Rows) -> np.ndarray:
    """[R] int32 tokens of each row's prompt."""
    return np.array([len(prompt) for prompt in side.texts], np.int32)


def rewritten(side: Rows, texts: Texts) -> DecodeState:
    """The rows' state after `texts`; their caches keep what they know of them."""
    before = np.asarray(side.state.tokens)
    tokens = np.full(before.shape, -1, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    count = np.array([len(text) for text in texts], np.int32)
    same = np.cumprod(tokens == before, axis=1, dtype=np.int32).sum(1, dtype=np.int32)
    known = prompt_lengths(side) + np.minimum(same, count - 1)
    next_pos = np.minimum(np.asarray(side.state.cache.next_pos), known)
    return replace_text(side.state, *map(jnp.asarray, (tokens, count, next_pos)))


def read(side: Rows, texts: Texts, asked: np.ndarray) -> None:
    """Reads what the caches of the rows `asked` lack, all but each text's last token, at once."""
    known = np.asarray(side.state.cache.next_pos) - prompt_lengths(side)
    lacks = asked & side.running & (known < [len(text) - 1 for text in texts])
    if not lacks.any():
        return
    missing = [
        text[n:-1] if lack else [] for text, n, lack in zip(texts, known, lacks, strict=True)
    ]
    tokens = np.full((len(texts), bucket_length(max(map(len, missing)))), -1, np.int32)
    for row, new in zip(tokens, missing, strict=True):
        row[: len(new)] = new

    def move(params: Params, state: DecodeState) -> DecodeState:
        # Like a prompt, it is read from the stack of all layers.
        model = side.model
        cache, _ = extend(model.params, jnp.asarray(tokens), state.cache, config=model.config)
        return dataclasses.replace(state, cache=cache)

    side.hold(~lacks)
    side.refund(lacks)  # the step counts a token for each
    side.step(move)
    side.resume()
