"""Ragged prompts on the host -> padded batches of few distinct shapes for the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.host.integers import check_integer, whole_id
from lookahead_jax.model.cache import SLOT_MULTIPLE, round_up
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import is_traced
from lookahead_jax.policies.base import Policy, WithDraft
from lookahead_jax.policies.full import Full
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


def pin_mask(spans: Sequence[Sequence[tuple[int, int]]], tokens: np.ndarray) -> np.ndarray:
    """Which positions of the padded batch `tokens` int32 [B, T] are to be pinned: bool [B, T].

    `spans` are (start, end) positions, one list for each row; end is not included. Raises
    ValueError for another number of lists, and for a span that is empty or not inside its row.
    """
    tokens = np.asarray(tokens)
    if len(spans) != len(tokens):
        raise ValueError(f"pin has {len(spans)} lists of spans for {len(tokens)} prompts")
    mask = np.zeros(tokens.shape, bool)
    for row, (listed, length) in enumerate(zip(spans, (tokens >= 0).sum(1), strict=True)):
        for span in listed:
            start, end = span
            for at in span:
                check_integer("a position of pin", at)
            if not 0 <= start < end <= length:
                raise ValueError(
                    f"pin: span ({start}, {end}) of row {row} is not inside its prompt of "
                    f"{length} tokens: 0 <= start < end <= {length}"
                )
            mask[row, start:end] = True
    return mask


def check_pinned(
    pinned: jax.Array | None, *, policy: Policy, budget: int, staying: int = 0
) -> None:
    """Raises ValueError for a row of `pinned` bool [B, T] with more positions than the budget.

    `staying` entries of it are those of a memory.
    Under jit they are unknown and not checked. The policy `full` has no budget.
    """
    if pinned is None or is_traced(pinned) or isinstance(policy, Full):
        return
    counts = np.asarray(pinned.sum(1))
    if (rows := np.flatnonzero(counts > budget - staying)).size:
        row, beside = int(rows[0]), ""
        if staying:
            beside = f", {staying} of them for the modules' memory"
        raise ValueError(
            f"row {row} pins {int(counts[row])} tokens and the budget is {budget} entries per "
            f"layer and head{beside}: pin less, or raise the budget"
        )


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
