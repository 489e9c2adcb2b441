"""Between the host and the device: ragged prompts -> padded batches of few distinct shapes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.model.cache import SLOT_MULTIPLE, round_up
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Policy
from lookahead_jax.prefilling.layer_pass import CHUNK


def bucket_length(tokens: int, chunk: int = CHUNK) -> int:
    """The padded length that `tokens` prompt tokens are compiled for.

    Powers of two from 16 to a chunk; above it 2, 3, 4, 6, 8, 12, ... chunks. A new length seldom
    compiles anew. Padding costs memory, hardly time: chunks without tokens are skipped.
    """
    if tokens < 1:
        raise ValueError("a prompt needs at least one token")
    size = 16
    while size < tokens:
        middle = size * 3 // 2
        if size > chunk and tokens <= middle:
            return middle
        size *= 2
    return size


def pad_batch(rows: Sequence[Sequence[int]], *, config: ModelConfig) -> np.ndarray:
    """Token rows of any lengths -> int32 [B, T], right-padded with -1 to a bucketed T.

    Raises ValueError for an empty row or an id outside the vocabulary.
    """
    width = bucket_length(max((len(row) for row in rows), default=0))
    batch = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        try:
            batch[i, : len(row)] = row
        except OverflowError:
            raise ValueError(
                f"a token id of row {i} is outside the vocabulary of {config.vocab_size}"
            ) from None
    check_tokens(batch, config=config)
    return batch


def pad_drafts(drafts: Sequence[Sequence[int]] | None, rows: int, width: int) -> jax.Array:
    """The first `width` tokens of every draft, int32 [rows, width] padded with -1.

    Raises ValueError unless there is one draft per row.
    """
    if drafts is None or len(drafts) != rows:
        given = "no drafts" if drafts is None else f"{len(drafts)} drafts"
        raise ValueError(f"{given} for {rows} prompts, of a policy that observes with drafts")
    padded = np.full((rows, width), -1, np.int32)
    for row, draft in zip(padded, drafts, strict=True):
        row[: min(len(draft), width)] = draft[:width]
    return jnp.asarray(padded)


def check_tokens(tokens: np.ndarray, *, config: ModelConfig) -> None:
    """Raises ValueError unless `tokens` is integer [B, T], right-padded with -1, ids in range.

    A check on the host: inside jit an id out of range would silently read the last row.
    """
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} {tokens.shape}")
    if not tokens.size:
        raise ValueError(f"tokens {list(tokens.shape)} hold no prompt")
    outside = (tokens >= config.vocab_size) | (tokens < -1)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"token id {tokens[row, column]} (row {row}, column {column}) is outside the "
            f"vocabulary of {config.vocab_size}"
        )
    filled = tokens >= 0
    if not filled[:, 0].all():
        raise ValueError(f"row {int(np.argmin(filled[:, 0]))} holds no token")
    if (filled[:, 1:] & ~filled[:, :-1]).any():
        raise ValueError("tokens must be padded with -1 on the right only")


def slots_for(
    policy: Policy, tokens: int, budget: int, new_tokens: int, *, config: ModelConfig
) -> int:
    """Cache slots for a padded prompt of `tokens`, its budget and `new_tokens` more."""
    return round_up(policy.max_entries(tokens, budget, config) + new_tokens, SLOT_MULTIPLE)
