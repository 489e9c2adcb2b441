"""Prompts -> text: the composition of prefill, decode and the tokenizer, with streaming.

Everything here runs on the host between device calls; the work is in prefill and decoding.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.drafted import Drafting, DraftReport
from lookahead_jax.decoding.eviction import DecodeEviction, opening_sums
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.sampling import GREEDY, Sampling, sampling_rows
from lookahead_jax.decoding.step import DecodeState, Step, seen_tokens, start
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.generation.output_text import Finish, OutputRow
from lookahead_jax.model.cache import SLOT_MULTIPLE, KVCache, round_up
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.growth import check_fit, warn_of_crossing
from lookahead_jax.model.layers import Params
from lookahead_jax.model.params import unstack
from lookahead_jax.model.sharding import on_its_mesh, place_rows
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling.batching import pad_batch, pad_drafts
from lookahead_jax.prefilling.diagnosis import non_finite_error
from lookahead_jax.prefilling.prefill import Prefilled, extend
from lookahead_jax.prompts.kvzip_replay import requests_to_repeat
from lookahead_jax.prompts.read import read_prompt

DEFAULT_BUDGET = 256
MAX_BUDGET = 2**24  # more than any prompt; sums of budgets stay within int32
Reader = Callable[..., Prefilled]
"""(prompts int32 [B, T] padded with -1, most tokens to follow, known_tokens=) -> their cache.

`known_tokens` (int or int32 [B]) of those that follow are a question's; given with questions only.
"""


def default_policy(lookahead: LookaheadModules | None) -> Policy:
    """What reads the lookahead modules where there are any, else SnapKV (preset factory)."""
    return SnapKV() if lookahead is None else LookaheadKV()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheReport:
    """How much of the prompt was kept."""

    kept_per_head: list[list[list[int]]]  # [L][B][K] prompt entries
    bytes: int  # allocated for the budgeted cache, room for new tokens included
    full_bytes: int  # what the same batch would allocate without eviction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds; compilation is left out, of the first two where `measure=True` asked for it."""

    ttft_s: float  # from tokens to the first new token
    eviction_overhead_s: float | None  # of that, what the policy adds to keeping everything
    decode_tokens_per_s: float | None  # over all rows, drafters included; None if none was decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Continuations of a batch of prompts."""

    tokens: list[list[int]]  # per row, an end-of-sequence token included
    text: list[str] | None  # None without a tokenizer; cut before a stop string
    finish: list[Finish]
    prompt_tokens: list[int]
    prompt_ids: list[list[int]]
    kept: np.ndarray  # [L, B, K, S] int32 ascending positions of kept prompt entries, -1 padded
    cache: CacheReport
    timing: Timing
    drafting: DraftReport


def encode_prompts(
    model: Model, prompts: Sequence[str | Sequence[int]], *, special: bool = True
) -> list[list[int]]:
    """Texts through the tokenizer, token rows as they are, less the padding at their end.

    `special` puts around a text what the tokenizer does (BOS, ...).
    """
    if isinstance(prompts, str):
        raise ValueError("prompts and questions are a list: give [text]")
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError("this model has no tokenizer.json: give token ids")
            row = model.tokenizer.encode(prompt, special=special)
        else:
            row = [int(token) for token in prompt]
            while row and row[-1] == -1:
                row.pop()
        if not row:
            raise ValueError(f"prompt {i} is empty")
        rows.append(row)
    if not rows:
        raise ValueError("no prompt was given")
    return rows


def encode_questions(
    model: Model, questions: Sequence[str | Sequence[int]], prompts: int
) -> list[list[int]]:
    """What is read behind prompts: as `encode_prompts`, but nothing is put around a text."""
    rows = encode_prompts(model, questions, special=False)
    if len(rows) != prompts:
        raise ValueError(f"{len(rows)} questions for {prompts} prompts")
    return rows


@on_its_mesh
def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    questions: Sequence[str | Sequence[int]] | None = None,
    policy: Policy | None = None,
    budget: int = DEFAULT_BUDGET,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    lookahead: LookaheadModules | None = None,
    drafts: Sequence[Sequence[int]] | None = None,
    eos_ids: Sequence[int] | None = None,
    drafter: str | HostDrafter | DeviceDrafter = "none",
    draft_nodes: int | Controller | None = None,
    evict_every: int | None = None,
    reader: Reader | None = None,
    burst: int = 16,
    on_text: Callable[[int, str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    measure: bool = False,
) -> Generation:
    """Continues a batch of prompts from a cache of `budget` entries per layer and KV head.

    `prompts` are texts or rows of token ids. `questions`, one for each, are read behind the cut
    cache: what is kept of a prompt is then chosen without knowing them. `policy` left out is
    LookaheadKV where `lookahead` modules are given, else SnapKV. One seed per row (default 0 for
    all: a row's output does not depend on its neighbours; give different seeds to sample one
    prompt several times). `drafts` are what a small model expects as answers
    (`speculation.speculate`), for the policy that observes with them.
    `on_text(row, piece)` receives text as it becomes certain. Tokens and text do not depend on
    `burst`, the number of steps between looks of the host. `measure` compiles and runs the
    prompt beforehand, with and without eviction, so that `timing` holds neither compilation nor
    guesses.

    `drafter` (a name for `make_drafter`, or one that has been used before and remembers)
    proposes trees of `draft_nodes` nodes, which a step of the model verifies: fewer steps, the
    same tokens. Left out, as many nodes as pay; a `Controller` given to call after call remembers
    how many those were. With `evict_every` = E the policy cuts each row again while it decodes, at
    every position that is a multiple of E: its heads hold `budget` to `budget` + E entries,
    however long the text becomes. `reader` reads the prompts instead, and evicts nothing
    (`kv_prediction.Predictor`): `policy` is then of no use. `on_step` receives every step's tree
    and accepted path as NumPy arrays.

    Raises ValueError for empty prompts, ids out of range, and a policy that cannot evict while
    decoding (h2o: behind questions) where it should; NonFiniteError (a ValueError), naming the
    first layer at fault, for logits that are NaN or infinite. Warns if a row grows past the length
    at which the model's RoPE factors change (model/rope.py).
    """
    config, params = model.config, model.params
    policy = policy or default_policy(lookahead)
    decoding_params = for_decoding(params)
    rows = encode_prompts(model, prompts)
    eos_ids = model.generation.eos_ids if eos_ids is None else tuple(eos_ids)
    seeds = [0] * len(rows) if seeds is None else list(seeds)
    if len(seeds) != len(rows):
        raise ValueError(f"{len(seeds)} seeds for {len(rows)} prompts")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    check_eos_ids(eos_ids)
    asked = None if questions is None else encode_questions(model, questions, len(rows))
    texts = rows if asked is None else [a + b for a, b in zip(rows, asked, strict=True)]
    announce(policy, budget, max(map(len, texts)) + max_new_tokens, config)
    tokens = place_rows(pad_batch(rows, config=config), params["embed"].sharding)
    behind = None if asked is None else jnp.asarray(pad_batch(asked, config=config))
    whole = tokens if asked is None else jnp.asarray(pad_batch(texts, config=config))
    asked_width = 0 if behind is None else behind.shape[1]
    known = 0 if asked is None else jnp.asarray([len(row) for row in asked], jnp.int32)
    expected = pad_drafts(drafts, len(rows), policy.draft_tokens) if policy.uses_draft else None
    packed = sampling_rows([sampling] * len(rows), seeds, config.vocab_size)
    eviction = None
    if evict_every is not None:
        if reader is not None:
            raise ValueError("a reader evicts nothing: leave evict_every out")
        eviction = DecodeEviction(policy=policy, budget=budget, interval=evict_every)
        if asked is not None and policy.accumulates:
            raise ValueError(
                f"policy {type(policy).__name__} adds up scores and would miss those of questions: "
                "leave evict_every out, or ask in the prompt"
            )

    drafting = Drafting(
        make_drafter(drafter) if isinstance(drafter, str) else drafter,
        draft_nodes,
        config=config,
        batch=len(rows),
        room=whole.shape[1] + max_new_tokens,
        eviction=eviction,
        modules=lookahead,
        on_step=on_step,
    )

    def read_by(policy: Policy, eviction: DecodeEviction | None) -> Prefilled:
        added = max_new_tokens
        if eviction is not None:
            added = eviction.room(tokens.shape[1], max_new_tokens, config)
        return read_prompt(
            params, tokens, config=config, policy=policy, budget=budget,
            new_tokens=asked_width + max_new_tokens, room=asked_width + added, modules=lookahead,
            known_tokens=known,
            eos_ids=eos_ids, with_scores=eviction is not None and policy.accumulates,
            draft=expected, asks=requests_to_repeat(policy, model.tokenizer),
        )  # fmt: skip

    def opened(result: Prefilled, eviction: DecodeEviction | None) -> DecodeState:
        cache, logits, sums = result.cache, result.logits, opening_sums(eviction, result)
        if behind is not None:
            cache, logits = extend(params, behind, cache, config=config)
        state = start(
            cache, logits,
            sampling=packed,
            limit=jnp.full(len(rows), max_new_tokens, jnp.int32),
            eos=jnp.asarray(eos_ids, jnp.int32),
            seen=seen_tokens(whole, config.vocab_size) if packed.penalized else None,
            width=max_new_tokens,
            sums=sums,
        )  # fmt: skip
        return jax.block_until_ready(state)

    def read() -> DecodeState:
        if reader is not None:
            given = {} if asked is None else {"known_tokens": known}
            result = reader(tokens, asked_width + max_new_tokens, **given)
            check_fit("reader", result.cache, known + max_new_tokens - 1)
            return opened(result, None)
        return opened(read_by(policy, eviction), eviction)

    def read_all() -> DecodeState:
        return opened(read_by(Full(), None), None)

    overhead = None
    if measure:
        read()
        read_all()
        keep_all = _seconds(read_all)
    begin = time.perf_counter()
    state = read()
    ttft = time.perf_counter() - begin
    if measure:
        overhead = ttft - keep_all

    filled, kept = _kept(state.cache, [len(row) for row in rows])
    report = CacheReport(
        kept_per_head=filled.tolist(),
        bytes=state.cache.bytes,
        full_bytes=_full_bytes(state.cache, tokens.shape[1] + asked_width + max_new_tokens),
    )
    outputs = [
        OutputRow(model.tokenizer, stop, None if on_text is None else partial(on_text, i))
        for i in range(len(rows))
    ]
    begin = time.perf_counter()
    state = drafting.begin(state, texts, whole)
    try:
        done = _deliver(outputs, state)
        check_finite(model, state, texts, outputs)
        while not done.all():
            if (done != np.asarray(state.done)).any():  # a stop string has ended a row
                # Placed as it was: an array without a place would compile the step once more.
                state = dataclasses.replace(state, done=jax.device_put(done, state.done.sharding))
            state = drafting.advance(decoding_params, state, burst)
            done = _deliver(outputs, state)
            check_finite(model, state, texts, outputs)
    except BaseException:
        drafting.abandon()
        raise
    drafting.end(state)
    spent = time.perf_counter() - begin - drafting.compile_s
    known_lengths = [len(row) for row in texts]
    total = [n + len(o.tokens) - 1 for n, o in zip(known_lengths, outputs, strict=True)]
    warn_of_crossing(known_lengths, total, config=config, stacklevel=3)
    for output in outputs:
        output.close()
    decoded = sum(len(output.tokens) - 1 for output in outputs)
    return Generation(
        tokens=[output.tokens for output in outputs],
        text=None if model.tokenizer is None else [output.text for output in outputs],
        finish=[output.finish(eos_ids) for output in outputs],
        prompt_tokens=[len(row) for row in rows],
        prompt_ids=rows,
        kept=kept,
        cache=report,
        timing=Timing(
            ttft_s=ttft,
            eviction_overhead_s=overhead,
            decode_tokens_per_s=decoded / spent if decoded else None,
        ),
        drafting=drafting.report(state),
    )


def for_decoding(params: Params) -> Params:
    """On CPU, and up to a gibibyte, a copy with layers apart: decoding reads it twice as fast.

    Prompts are still read with stacked layers, which is what bounds their memory.
    """
    leaves = jax.tree.leaves(params["layers"])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    apart = isinstance(params["layers"], tuple)
    devices = leaves[0].sharding.device_set
    if apart or size > 2**30 or len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return params
    return unstack(params)


def check_eos_ids(eos_ids: Sequence[int]) -> None:
    """Raises ValueError unless all can be token ids; ids beyond the vocabulary never come up."""
    if any(not 0 <= token < 2**31 for token in eos_ids):
        raise ValueError(f"eos_ids {list(eos_ids)} are not all token ids")


def announce(policy: Policy, budget: int, length: int, config: ModelConfig) -> None:
    """Warns of what the user asked for and will not quite get.

    Raises ValueError for a budget that is no number of entries.
    """
    if not 1 <= budget <= MAX_BUDGET:
        raise ValueError(
            f"budget must be 1 to {MAX_BUDGET} entries, not {budget}; that of a prompt's length "
            "keeps all of it"
        )
    if (notice := policy.notice(budget)) is not None:
        warnings.warn(notice, stacklevel=3)
    if length > config.max_position:
        warnings.warn(
            f"{length} tokens are more than the {config.max_position} positions this model was "
            "made for; expect nonsense beyond them",
            stacklevel=3,
        )


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


def _kept(cache: KVCache, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """How many entries of each prompt there are [L, B, K], and their positions [L, B, K, S].

    A question's entries stand behind them.
    """
    pos = np.asarray(cache.pos)
    mine = (pos >= 0) & (pos < np.array(lengths)[None, :, None, None])
    filled = mine.sum(-1, dtype=np.int32)
    return filled, np.where(mine, pos, -1)[..., : int(filled.max())]


def _full_bytes(cache: KVCache, tokens: int) -> int:
    """Bytes of a cache of the same kind that evicts nothing."""
    return cache.bytes // cache.slots * round_up(tokens, SLOT_MULTIPLE)


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
