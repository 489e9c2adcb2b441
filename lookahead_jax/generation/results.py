"""What `generate` returns: continuations, and reports on cache, time and drafting."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lookahead_jax.decoding.draft_report import DraftReport
from lookahead_jax.decoding.logprobs import Logprobs
from lookahead_jax.generation.output_text import FinishReason
from lookahead_jax.model.cache import KVCache


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
    kept: np.ndarray  # [L, B, K, S] int32 ascending positions of kept prompt entries, -1 padded;
    # for the policy `rerotate` those that it gives them
    cache: CacheReport
    timing: Timing
    drafting: DraftReport
    logprobs: list[Logprobs] | None = None  # per row, of all its tokens; None unless asked for


def report_cache(
    cache: KVCache,
    prompt_tokens: Sequence[int],
    question_tokens: np.ndarray,
    all_tokens: Sequence[int],
    *,
    staying: int,
) -> tuple[CacheReport, np.ndarray]:
    """The report on a cache after prompt and question, and the kept positions [L, B, K, S] int32.

    Entries after a row's prompt, `staying` ones of a memory and those of a question [B], are not
    counted as kept. `all_tokens` of a row are its prompt, question and new tokens. Without eviction
    each of them needs an entry; padding is not counted.
    """
    pos = np.asarray(cache.pos)
    # Both bounds, since a policy may give the prompt's entries other positions.
    end = np.minimum(prompt_tokens, np.asarray(cache.next_pos) - question_tokens - staying)
    of_prompt = (pos >= 0) & (pos < end[None, :, None, None])
    counts = of_prompt.sum(-1, dtype=np.int32)
    report = CacheReport(
        kept_per_head=counts.tolist(),
        bytes=cache.bytes,
        full_bytes=cache.bytes // (cache.slots * len(prompt_tokens)) * sum(all_tokens),
    )
    return report, np.where(of_prompt, pos, -1)[..., : int(counts.max())]
