"""Prompts -> text: reads prompts, decodes, and turns tokens into text as they come.

Everything here runs on the host between device calls.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.grammar import Grammar, GrammarError
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.decoding.logprobs import Logprobs, on_host
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.row_error import RowError
from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.decoding.step import Step
from lookahead_jax.decoding.weights import for_decoding
from lookahead_jax.generation.inputs import (
    DEFAULT_BUDGET,
    PromptBatch,
    announce,
    check_eviction,
    compiled_grammar,
    default_policy,
    draft_tokens,
    encode_batch,
    end_ids,
    row_seeds,
)
from lookahead_jax.generation.memory import check_memory
from lookahead_jax.generation.open_batch import Reader, open_timed
from lookahead_jax.generation.output_text import OutputRow
from lookahead_jax.generation.results import Generation, Timing, report_cache
from lookahead_jax.generation.settings import ContinuationSettings, DraftSettings, EvictionSettings
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.cache import cache_type
from lookahead_jax.model.growth import warn_of_crossing
from lookahead_jax.model.sharding import on_its_mesh
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy
from lookahead_jax.prefilling.diagnosis import non_finite_error


@on_its_mesh
def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    questions: Sequence[str | Sequence[int]] | None = None,
    pin: Sequence[Sequence[tuple[int, int]]] | None = None,
    policy: Policy | None = None,
    budget: int = DEFAULT_BUDGET,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    lookahead: LookaheadModules | None = None,
    drafts: Sequence[Sequence[int]] | Model | None = None,
    eos_ids: Sequence[int | str] | None = None,
    stop_token_ids: Sequence[int | str] = (),
    drafter: str | HostDrafter | DeviceDrafter = "none",
    draft_nodes: int | Controller | None = None,
    evict_every: int | None = None,
    cache_dtype: str | None = None,
    logprobs: int | None = None,
    grammar: Grammar | None = None,
    reader: Reader | None = None,
    burst: int = 16,
    on_text: Callable[[int, str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    measure: bool = False,
) -> Generation:
    """Continues a batch of prompts from a cache of `budget` entries per layer and KV head.

    A row's output does not depend on the other rows, on `burst`, or on a drafter. Most of the
    function is its arguments and their checks; the work is in `open_timed` and `decode_rows`.

    Args:
      prompts: texts or rows of token ids.
      questions: read after the evicted cache: the policy chooses what to keep of a prompt without
        knowing its question. One per prompt, or n for each, in the order of the prompts: then a
        prompt is read and cut once, and there are n rows for it, each with a copy of that cache
        and, where RoPE factors depend on length, those of the longest of its questions.
      pin: for each prompt, spans (start, end) of its tokens that are kept whatever their score, in
        every layer and head and while decoding; end is not included. They count in the budget. A
        layer with a sliding window keeps them while later tokens can see them.
      policy: default LookaheadKV if `lookahead` modules are given, else SnapKV.
      seeds: one per row, default 0 for all. Give different seeds to sample one prompt repeatedly.
      stop: strings that end a row; the text ends before them. They may be or contain special
        tokens, which the text omits.
      lookahead: the modules that LookaheadKV reads.
      drafts: for policy SpecKV, answers drafted by a small model, one per prompt as token
        ids, or the small model itself. Policy LAQ with draft=trie takes them from `drafter` if that
        runs on the host, and so from earlier calls.
      eos_ids: tokens that end a row, by id or content; default: the checkpoint's own.
      stop_token_ids: more such tokens. The text omits the token that ends a row.
      drafter: proposes token trees that the model verifies, for fewer steps and the same tokens: a
        name for `make_drafter`, or a drafter, which may remember earlier calls.
      draft_nodes: nodes per tree; default: chosen from measured cost and accepted tokens. A
        `Controller` keeps these measurements from one call to the next.
      evict_every: E, to evict again at every position that is a multiple of E: each head holds
        `budget` to `budget` + E entries, however long the text becomes.
      cache_dtype: "int8" stores keys and values in eight bits with one scale per slot and KV head.
        A prompt is read as usual and rounded when it is cut; default: the dtype of the weights.
      logprobs: also return the log-probability of every token, and of so many (0 to 20) of the
        likeliest tokens in its place: those of the model alone, before `sampling` changes anything.
      grammar: what every output must be up to its end token, such as JSON of a schema. The
        host makes masks between steps, so steps come one at a time.
      reader: reads the prompts instead of the policy and evicts nothing
        (`kv_prediction.Predictor`).
      burst: steps between two looks of the host at the output.
      on_text: receives (row, piece) when a piece of text is certain.
      on_step: receives every step's tree and accepted path as NumPy arrays.
      measure: reads the prompts twice, with and without eviction, so that `timing` includes no
        compilation.

    Raises ValueError for empty prompts, ids out of range, invalid tokens and sizes, more
    pinned tokens than the budget, a policy without the modules or drafts that it needs, and one
    that cannot evict during decoding (h2o: after questions) with `evict_every`; GrammarError (a
    ValueError) for a grammar that is not supported; NonFiniteError (a
    ValueError), naming the first layer at fault, for logits that are NaN or infinite. Warns if a
    row grows past the length at which the model's RoPE factors change (model/rope.py).
    """
    eviction = EvictionSettings(
        policy=policy or default_policy(lookahead), budget=budget, modules=lookahead,
        evict_every=evict_every, cache_dtype=cache_type(cache_dtype),
    )  # fmt: skip
    check_integer("burst", burst, least=1)
    check_eviction(eviction, by_reader=reader is not None, questions=questions is not None)
    batch = encode_batch(model, prompts, questions, pin)
    rows = len(batch.texts)
    ends = end_ids(model, eos_ids, stop_token_ids)
    continuation = ContinuationSettings(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=row_seeds(seeds, rows),
        eos_ids=ends,
        logprobs=logprobs,
        grammar=compiled_grammar(model, grammar, ends),
    )
    if reader is None:
        check_memory(
            model, eviction, rows=rows, prompt_tokens=batch.longest, new_tokens=max_new_tokens
        )
    follows = eviction.staying + max_new_tokens
    announce(eviction.policy, budget, batch.longest + follows, model.config)
    outputs = _output_rows(model, batch, stop, continuation.eos_ids, on_text=on_text)
    draft = DraftSettings.of(drafter, draft_nodes)
    drafting = Drafting(
        draft.drafter,
        draft.nodes,
        config=model.config,
        batch=rows,
        room=batch.text_tokens.shape[1] + max_new_tokens,
        eviction=eviction.while_decoding(),
        modules=lookahead,
        on_step=on_step,
    )
    if continuation.grammar is not None:
        for row in range(rows):
            drafting.constrain(row, continuation.grammar.begin())
    observed = draft_tokens(
        eviction.policy, drafts, batch.prompts, eos_ids=continuation.eos_ids, drafter=draft.drafter
    )
    state, ttft_s, overhead_s = open_timed(
        model, batch, continuation, eviction, drafts=observed, reader=reader, measure=measure
    )
    prompt_tokens = [len(row) for row in batch.row_prompts]
    text_tokens = [len(text) for text in batch.texts]
    all_tokens = [tokens + max_new_tokens for tokens in text_tokens]
    cache, kept = report_cache(
        state.cache,
        prompt_tokens,
        np.subtract(text_tokens, prompt_tokens),
        all_tokens,
        staying=0 if reader is not None else eviction.staying,
    )
    state, decode_s = decode_rows(model, state, batch, drafting, outputs=outputs, burst=burst)
    _warn_of_crossing(model, batch, outputs)
    decoded = sum(len(output.tokens) - 1 for output in outputs)
    timing = Timing(
        ttft_s=ttft_s,
        eviction_overhead_s=overhead_s,
        decode_tokens_per_s=decoded / decode_s if decoded else None,
    )
    return Generation(
        tokens=[output.tokens for output in outputs],
        text=None if model.tokenizer is None else [output.text for output in outputs],
        finish=[output.finish() for output in outputs],
        prompt_tokens=prompt_tokens,
        prompt_ids=batch.row_prompts,
        kept=kept,
        cache=cache,
        timing=timing,
        drafting=drafting.report(state),
        logprobs=_logprobs(state, outputs),
    )


def _logprobs(state: DecodeState, outputs: Sequence[OutputRow]) -> list[Logprobs] | None:
    """Those of each row's tokens, if they were recorded."""
    if state.logprobs is None:
        return None
    return [
        on_host(state.logprobs, row).between(0, len(output.tokens))
        for row, output in enumerate(outputs)
    ]


def _warn_of_crossing(model: Model, batch: PromptBatch, outputs: Sequence[OutputRow]) -> None:
    """Warns if a row has grown past the length at which the RoPE factors change."""
    lengths = [len(text) for text in batch.texts]
    total = [n + len(output.tokens) - 1 for n, output in zip(lengths, outputs, strict=True)]
    warn_of_crossing(lengths, total, config=model.config)


def _output_rows(
    model: Model,
    batch: PromptBatch,
    stop: Sequence[str],
    end_ids: Sequence[int],
    *,
    on_text: Callable[[int, str], None] | None,
) -> list[OutputRow]:
    return [
        OutputRow(
            model.tokenizer, prompt=text, stop=stop, end_ids=end_ids,
            on_text=None if on_text is None else partial(on_text, i),
        )
        for i, text in enumerate(batch.texts)
    ]  # fmt: skip


def decode_rows(
    model: Model,
    state: DecodeState,
    batch: PromptBatch,
    drafting: Drafting,
    *,
    outputs: Sequence[OutputRow],
    burst: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[DecodeState, float]:
    """Decodes all rows to their ends; the seconds do not include compilation.

    Between two bursts `interrupted` may end all rows where they are.
    """
    params = for_decoding(model.params)
    begin = time.perf_counter()
    state = drafting.begin(state, batch.texts, batch.text_tokens)
    try:
        done = _deliver(outputs, state)
        check_finite(model, state, batch.texts, outputs)
        while not done.all() and not interrupted():
            if (done != np.asarray(state.done)).any():  # a stop string has ended a row
                # Placed as it was: an array without a place would compile the step once more.
                state = dataclasses.replace(state, done=jax.device_put(done, state.done.sharding))
            state = drafting.advance(params, state, burst)
            done = _deliver(outputs, state)
            check_finite(model, state, batch.texts, outputs)
    except RowError as failed:
        drafting.abandon()
        if isinstance(failed.error, GrammarError):
            raise failed.error from None
        raise
    except BaseException:
        drafting.abandon()
        raise
    drafting.end(state)
    seconds = time.perf_counter() - begin - drafting.compile_s
    for output in outputs:
        output.close()
    return state, seconds


def _deliver(outputs: Sequence[OutputRow], state: DecodeState) -> np.ndarray:
    """Hands new tokens to each row's output; which rows are done, stop strings included [B]."""
    tokens, count, done = (np.array(a) for a in (state.tokens, state.count, state.done))
    for i, output in enumerate(outputs):
        output.feed(tokens[i, len(output.tokens) : count[i]].tolist())
        done[i] |= output.stopped
    return done


def check_finite(
    model: Model, state: DecodeState, texts: Sequence[list[int]], outputs: Sequence[OutputRow]
) -> None:
    """Raises NonFiniteError, which names the layer, if a row's logits are NaN or infinite."""
    for i in np.flatnonzero(~np.asarray(state.finite)).tolist():
        tokens = texts[i] + outputs[i].tokens
        raise non_finite_error(model.params, tokens, f"row {i}", config=model.config)
