"""Rewards of a head on hidden states: each text is read to its end, and nothing of it is kept.

The last emitted token of a row has not been read, so its hidden state is that of one more step of
the model, in one batch for all rows. R rows, P tokens that the caches lack.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.modules.reward_head import RewardHead, reward_logits
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prefilling.prefill import read_behind
from lookahead_jax.strategies.primitives import cut_cache


def text_chances(
    head: RewardHead,
    state: DecodeState,
    rows: Sequence[int],
    starts: np.ndarray,  # [R] the position of each row's own text
    *,
    model: Model,
    params: Params,  # of the model, in the layout for decoding
    ends: Sequence[int],
) -> list[float]:
    """The head's probability that each of `rows` is right so far, in one pass.

    Of a row that has ended with one of the tokens `ends`, it is that of the text before: steps that
    a head is trained on have none. A row with nothing but an end token is read with it.
    """
    if not rows:
        return []
    tokens, next_pos = _unread(state, rows, starts, ends)
    if tokens.shape[1] > 1:  # like prompts, these are read from the stack of all layers
        params = model.params
    found = chances(
        params, head, state.cache, jnp.asarray(tokens), jnp.asarray(next_pos), config=model.config
    )
    return np.asarray(found)[list(rows)].tolist()


def _unread(
    state: DecodeState, rows: Sequence[int], starts: np.ndarray, ends: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What the pass has to read: tokens int32 [R, P], padded with -1, and their positions [R]."""
    texts, count = np.asarray(state.tokens), np.asarray(state.count)
    next_pos = np.array(state.cache.next_pos)
    missing = [np.zeros(0, np.int32)] * len(texts)
    for row in rows:
        length = int(count[row])
        if length > 1 and texts[row, length - 1] in ends:
            length -= 1
        known = min(int(next_pos[row] - starts[row]), length - 1)
        next_pos[row] = starts[row] + known
        missing[row] = texts[row, known:length]
    width = max(map(len, missing))
    tokens = np.full((len(texts), 1 if width == 1 else bucket_length(width)), -1, np.int32)
    for padded, new in zip(tokens, missing, strict=True):
        padded[: len(new)] = new
    return tokens, next_pos


@program(static_argnames=("config",))
def chances(
    params: Params,
    head: RewardHead,
    cache: KVCache,
    tokens: Int[Array, "R P"],
    next_pos: Int[Array, " R"],
    *,
    config: ModelConfig,
) -> Float[Array, " R"]:
    """The head's probability that each text is right which ends with `tokens`.

    They are read behind the entries before `next_pos`. Rows without tokens mean nothing.
    """
    _, hidden = read_behind(params, tokens, cut_cache(cache, next_pos), config=config)
    return jax.nn.sigmoid(reward_logits(head, hidden))
