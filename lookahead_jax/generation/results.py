"""What `generate` returns: continuations, and reports on cache, time and drafting."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lookahead_jax.decoding.drafted import DraftReport
from lookahead_jax.generation.output_text import FinishReason
from lookahead_jax.model.cache import SLOT_MULTIPLE, KVCache, round_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheReport:
    """How much of the prompts was kept."""

    kept_per_head: list[list[list[int]]]  # [L][B][K] prompt entries
    bytes: int  # allocated for the budgeted cache, room for new tokens and padding included
    full_bytes: int  # what these prompts and their new tokens would need without eviction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds. Decoding never includes compilation; the others do unless `measure=True`."""

    ttft_s: float  # from tokens to the first new token
    eviction_overhead_s: float | None  # of that, what the policy adds to keeping everything
    decode_tokens_per_s: float | None  # over all rows, drafters included; None if none was decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Continuations of a batch of prompts."""

    tokens: list[list[int]]  # per row, an end-of-sequence token included
    text: list[str] | None  # without special tokens, cut before a stop string; None: no tokenizer
    finish: list[FinishReason]
    prompt_tokens: list[int]
    prompt_ids: list[list[int]]
    kept: np.ndarray  # [L, B, K, S] int32 ascending positions of kept prompt entries, -1 padded
    cache: CacheReport
    timing: Timing
    drafting: DraftReport


def kept_positions(cache: KVCache, prompt_tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How many entries of each prompt are kept [L, B, K], and their positions [L, B, K, S].

    Entries behind the prompt, those of a question, are left out.
    """
    pos = np.asarray(cache.pos)
    of_prompt = (pos >= 0) & (pos < np.array(prompt_tokens)[None, :, None, None])
    counts = of_prompt.sum(-1, dtype=np.int32)
    return counts, np.where(of_prompt, pos, -1)[..., : int(counts.max())]


def full_bytes(cache: KVCache, longest: int) -> int:
    """Bytes of a cache for as many rows of `longest` tokens that evicts nothing.

    Slots are rounded up as the kernels need them; a prompt's padding to its bucket does not count.
    """
    return cache.bytes // cache.slots * round_up(longest, SLOT_MULTIPLE)
