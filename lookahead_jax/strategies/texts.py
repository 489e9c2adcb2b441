"""Rows that go on after other texts than their own, as a search does that goes back to a node.

A node of a search is its text. No cache is kept for it, so memory is that of the rows: a row takes
what the rows of its prompt have in their caches, and reads the rest of the text in one pass.
R rows, G prompts, n rows for each, W tokens at most.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.model.params import Params
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.strategies.primitives import replace_text
from lookahead_jax.strategies.rows import Rows

Texts = Sequence[Sequence[int]]  # for each row the tokens of a continuation, at least one


def put_texts(rows: Rows, texts: Texts) -> None:
    """The rows go on after `texts`, of which nothing is counted; `read_texts` has to follow."""
    rows.restore(rewritten(rows, texts))


def rewritten(rows: Rows, texts: Texts) -> DecodeState:
    """The rows' state after `texts`; `read_texts` has to follow before they decode.

    Each takes over the cache of the row of its prompt that knows most of its text.
    """
    before = np.asarray(rows.state.tokens)
    tokens = np.full(before.shape, -1, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    count = np.array([len(text) for text in texts], np.int32)
    shape = rows.groups.shape
    equal = tokens.reshape(*shape, 1, -1) == before.reshape(shape[0], 1, shape[1], -1)
    same = np.logical_and.accumulate(equal, axis=-1).sum(-1)  # [G, n, n]
    known = np.minimum(same, _read_tokens(rows).reshape(shape)[:, None])
    known = np.minimum(known, count.reshape(*shape, 1) - 1)
    best = (2 * known + np.eye(shape[1], dtype=np.int64)).argmax(-1)  # itself, if it knows as much
    source = (rows.groups[:, :1] + best).reshape(-1)
    if (source != np.arange(len(source))).any():
        rows.gather(source)
    next_pos = rows.starts + known.max(-1).reshape(-1)
    arrays = tokens, count, next_pos.astype(np.int32)
    return replace_text(rows.state, *map(jnp.asarray, arrays))


def read_texts(rows: Rows, texts: Texts, asked: np.ndarray) -> None:
    """Reads what the caches of the rows `asked` [R] lack, all but each text's last token, at once.

    This is one step for each prompt that lacks something. No row is paused afterwards.
    """
    known = _read_tokens(rows)
    lacks = asked & rows.running & (known < [len(text) - 1 for text in texts])
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
        model = rows.model
        cache, _ = extend(model.params, jnp.asarray(tokens), state.cache, config=model.config)
        return dataclasses.replace(state, cache=cache)

    rows.hold(~lacks)
    rows.refund(lacks)  # the step counts a token for each
    rows.step(move)
    rows.resume()


def is_complete(rows: Rows, row: int) -> bool:
    """Whether a row's text has ended by itself, and not because its prompt's work is spent."""
    output = rows.outputs[row]
    return output.finish() != "length" or len(output.tokens) == rows.state.tokens.shape[1]


def _read_tokens(rows: Rows) -> np.ndarray:
    """[R] tokens of each row's own text that its cache holds."""
    return np.asarray(rows.state.cache.next_pos) - rows.starts
