"""Ragged prompts on the host -> padded batches of few distinct shapes for the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.host.integers import check_integer, whole_id
from lookahead_jax.model.cache import SLOT_MULTIPLE, round_up
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.policies.base import Policy, WithDraft
from lookahead_jax.prefilling.layer_pass import CHUNK


def bucket_length(tokens: int, chunk: int = CHUNK) -> int:
    """The padded length that `tokens` prompt tokens are compiled for.

    Powers of two from 16 to a chunk; above it 2, 3, 4, 6, 8, 12, ... chunks. So few new lengths
    need compiling. Padding costs memory but little time: chunks without tokens are skipped.
    Raises ValueError for less than one token.
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

    Raises ValueError for an empty row, and for an id that is not an integer or is outside the
    vocabulary.
    """
    width = bucket_length(max((len(row) for row in rows), default=0))
    batch = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        try:
            batch[i, : len(row)] = [whole_id(token, "a token") for token in row]
        except OverflowError:
            raise ValueError(
                f"a token id of row {i} is outside the vocabulary of {config.vocab_size}"
            ) from None
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from None
    check_tokens(batch, config=config)
    return batch


def pad_drafts(
    policy: Policy, drafts: Sequence[Sequence[int]] | None, rows: int
) -> jax.Array | None:
    """As many tokens of every draft as the policy reads, int32 [rows, tokens] padded with -1.

    None for a policy that reads no drafts. Raises ValueError unless there is one draft per row, of
    integer token ids.
    """
    if not isinstance(policy.reading, WithDraft):
        return None
    width = policy.reading.tokens
    if drafts is None or len(drafts) != rows:
        given = "none" if drafts is None else len(drafts)
        raise ValueError(
            f"policy {type(policy).__name__} needs a draft per prompt ({rows} prompts, drafts: "
            f"{given}): give drafts=, answers drafted by a small model"
        )
    padded = np.full((rows, width), -1, np.int32)
    for row, draft in zip(padded, drafts, strict=True):
        row[: min(len(draft), width)] = [whole_id(token, "a token") for token in draft[:width]]
    return jnp.asarray(padded)


def check_tokens(tokens: np.ndarray, *, config: ModelConfig) -> None:
    """Raises ValueError unless `tokens` is integer [B, T], right-padded with -1, ids in range.

    This check is on the host: inside jit, an id out of range silently reads the last row.
    """
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} {tokens.shape}")
    if not tokens.size:
        raise ValueError(f"tokens of shape {list(tokens.shape)} hold no prompt")
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
    """Cache slots for a padded prompt of `tokens`, its budget and `new_tokens` more.

    Raises ValueError for a size that is not an integer.
    """
    for name, value in (("tokens", tokens), ("budget", budget), ("new_tokens", new_tokens)):
        check_integer(name, value, least=0)
    return round_up(policy.max_entries(tokens, budget, config) + new_tokens, SLOT_MULTIPLE)
