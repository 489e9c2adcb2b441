"""Prompts -> text: the composition of prefill, decode and the tokenizer, with streaming.

Everything here runs on the host between device calls; the work is in prefill and decoding.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lookahead_jax.batching import bucket_length, check_tokens, pad_batch, slots_for
from lookahead_jax.cache import SLOT_MULTIPLE, KVCache, round_up
from lookahead_jax.checkpoint import Model
from lookahead_jax.config import ModelConfig
from lookahead_jax.decoding import DecodeState, Step, decode, seen_tokens, start
from lookahead_jax.drafters import make_drafter
from lookahead_jax.drafters.device import DeviceDrafter
from lookahead_jax.drafters.host import Host
from lookahead_jax.drafting import Drafting, DraftReport
from lookahead_jax.layers import Params
from lookahead_jax.lookahead import LookaheadModules, observer_block
from lookahead_jax.model import Block, embed, logits
from lookahead_jax.params import unstack
from lookahead_jax.policies.base import Policy, scores_by_position
from lookahead_jax.policies.full import Full, Whole
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefill import Prefilled, compress, prefill
from lookahead_jax.prompt import hidden_states
from lookahead_jax.sampling import GREEDY, Sampling, sampling_rows
from lookahead_jax.streaming import Finish, OutputRow

DEFAULT_BUDGET = 256


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
    decode_tokens_per_s: float | None  # over all rows; None if nothing was decoded


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


def encode_prompts(model: Model, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Texts through the tokenizer, token rows as they are, less the padding at their end."""
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError("this model has no tokenizer.json: give token ids")
            row = model.tokenizer.encode(prompt)
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


def read_prompt(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    new_tokens: int,
    modules: LookaheadModules | None = None,
    eos_ids: Sequence[int] = (),
    with_scores: bool = False,
    room: int | None = None,
) -> Prefilled:
    """Prompt batch int32 [B, T] -> budgeted cache, whatever passes the policy needs.

    At most `new_tokens` will follow; the cache has slots for `room` of them (None: for all).
    Policies that use lookahead modules read them after the prompt. Two-pass policies first keep
    everything, decode a response of `policy.response_tokens` tokens on it (or on a copy that
    their `draft_policy` has cut to the same budget), and cut by what that response looks at.
    """
    room = new_tokens if room is None else room
    if policy.two_pass:
        return _read_twice(
            params, tokens, config=config, policy=policy, budget=budget, new_tokens=new_tokens,
            eos_ids=eos_ids, with_scores=with_scores, room=room,
        )  # fmt: skip
    slots = slots_for(policy, tokens.shape[1], budget, room, config=config)
    observer = None
    if policy.uses_modules:
        if modules is None:
            raise ValueError(
                f"policy {type(policy).__name__} reads lookahead modules; name their folder"
            )
        length = (tokens >= 0).sum(1, dtype=jnp.int32)
        observer = observer_block(modules, length, length + new_tokens)
    return prefill(
        params, tokens, config=config, policy=policy, budget=budget, slots=slots,
        new_tokens=new_tokens, observer=observer, with_scores=with_scores,
    )  # fmt: skip


def _read_twice(
    params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    policy: Policy,
    budget: int,
    new_tokens: int,
    eos_ids: Sequence[int],
    with_scores: bool,
    room: int,
) -> Prefilled:
    """`read_prompt` for policies that see a response before they cut."""
    width, answer = tokens.shape[1], policy.response_tokens
    full = prefill(
        params, tokens, config=config, policy=Whole(), budget=0, new_tokens=new_tokens,
        slots=slots_for(Whole(), width, 0, answer, config=config),
    )  # fmt: skip
    if (draft := policy.draft_policy) is None:
        copy = full.cache.fork(1)
    else:
        again = read_again(params, tokens, draft.window_rows(budget), None, full.cache, config)
        slots = slots_for(draft, full.cache.slots, budget, answer, config=config)
        copy, _ = compress(
            params, full.cache, again, config=config, policy=draft, budget=budget, slots=slots
        )
    response = decode(
        params, copy, full.logits, config=config, max_new_tokens=answer, eos_ids=eos_ids
    ).tokens
    again = read_again(params, tokens, policy.window_rows(budget), response, full.cache, config)
    slots = slots_for(policy, full.cache.slots, budget, room, config=config)
    cache, scores = compress(
        params, full.cache, again, config=config, policy=policy, budget=budget, slots=slots,
        with_scores=with_scores,
    )  # fmt: skip
    if scores is not None:
        scores = scores_by_position(scores, full.cache.pos, width)
    return Prefilled(cache, full.logits, scores)


def read_again(
    params: Params,
    tokens: jax.Array,
    rows: int,
    response: jax.Array | None,
    cache: KVCache,
    config: ModelConfig,
) -> Block:
    """The last `rows` tokens of each prompt, then `response` [B, Y], as rows over its full cache.

    The cache holds the prompt's rows already: they are seen there, not in the block.
    """
    first = cache.next_pos[:, None] - rows
    positions = first + jnp.arange(rows, dtype=jnp.int32)[None]
    ids = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
    ids = jnp.where(positions >= 0, ids, -1)
    if response is not None:
        ids = jnp.concatenate([ids, response], axis=1)
    step = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return Block(
        x=embed(params, ids, config=config),
        positions=jnp.where(ids >= 0, first + step[None], -1),
        rope_span=cache.rope_span,
        visible=jnp.broadcast_to((step >= rows)[None, None], (*ids.shape, ids.shape[1])),
    )


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    policy: Policy | None = None,
    budget: int = DEFAULT_BUDGET,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    lookahead: LookaheadModules | None = None,
    eos_ids: Sequence[int] | None = None,
    drafter: str | Host | DeviceDrafter = "none",
    draft_nodes: int | None = None,
    burst: int = 16,
    on_text: Callable[[int, str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    measure: bool = False,
) -> Generation:
    """Continues a batch of prompts from a cache of `budget` entries per layer and KV head.

    `prompts` are texts or rows of token ids. `policy` left out is LookaheadKV where `lookahead`
    modules are given, else SnapKV. One seed per row (default 0 for all: a row's output does not
    depend on its neighbours; give different seeds to sample one prompt several times).
    `on_text(row, piece)` receives text as it becomes certain. Tokens and text do not depend on
    `burst`, the number of steps between looks of the host. `measure` compiles and runs the
    prompt beforehand, with and without eviction, so that `timing` holds neither compilation nor
    guesses.

    `drafter` (a name of `drafters.DRAFTERS`, or one that has been used before and remembers)
    proposes trees of up to `draft_nodes` nodes, which a step of the model verifies: fewer steps,
    the same tokens. `on_step` receives every step's tree and accepted path as NumPy arrays.

    Raises ValueError for empty prompts and ids out of range.
    """
    config, params = model.config, model.params
    policy = policy or default_policy(lookahead)
    decoding_params = for_decoding(params)
    rows = encode_prompts(model, prompts)
    eos_ids = model.generation.eos_ids if eos_ids is None else tuple(eos_ids)
    seeds = [0] * len(rows) if seeds is None else list(seeds)
    if len(seeds) != len(rows):
        raise ValueError(f"{len(seeds)} seeds for {len(rows)} prompts")
    if max_new_tokens < 1 or budget < 1:
        raise ValueError("max_new_tokens and budget must be at least 1")
    announce(policy, budget, max(map(len, rows)) + max_new_tokens, config)
    tokens = jnp.asarray(pad_batch(rows, config=config))
    packed = sampling_rows([sampling] * len(rows), seeds, config.vocab_size)

    drafting = Drafting(
        make_drafter(drafter) if isinstance(drafter, str) else drafter,
        draft_nodes,
        config=config,
        batch=len(rows),
        room=tokens.shape[1] + max_new_tokens,
        on_step=on_step,
    )

    def read(policy: Policy) -> DecodeState:
        result = read_prompt(
            params, tokens, config=config, policy=policy, budget=budget,
            new_tokens=max_new_tokens, modules=lookahead, eos_ids=eos_ids,
        )  # fmt: skip
        state = start(
            result.cache, result.logits,
            sampling=packed,
            limit=jnp.full(len(rows), max_new_tokens, jnp.int32),
            eos=jnp.asarray(eos_ids, jnp.int32),
            seen=seen_tokens(tokens, config.vocab_size) if packed.penalized else None,
            width=max_new_tokens,
        )  # fmt: skip
        return jax.block_until_ready(state)

    overhead = None
    if measure:
        read(policy)
        read(Full())
        keep_all = _seconds(lambda: read(Full()))
    begin = time.perf_counter()
    state = read(policy)
    ttft = time.perf_counter() - begin
    if measure:
        overhead = ttft - keep_all
    state = drafting.begin(state, rows, tokens)

    prompt_cache = state.cache
    filled = np.asarray(prompt_cache.length)
    kept = np.asarray(prompt_cache.pos[..., : int(filled.max())])
    report = CacheReport(
        kept_per_head=filled.tolist(),
        bytes=prompt_cache.bytes,
        full_bytes=_full_bytes(prompt_cache, tokens.shape[1] + max_new_tokens),
    )
    outputs = [
        OutputRow(model.tokenizer, stop, None if on_text is None else partial(on_text, i))
        for i in range(len(rows))
    ]
    begin = time.perf_counter()
    done = _deliver(outputs, state)
    while not done.all():
        # Placed as it was: an array without a place would compile the step once more.
        state = dataclasses.replace(state, done=jax.device_put(done, state.done.sharding))
        state = drafting.advance(decoding_params, state, burst)
        done = _deliver(outputs, state)
    spent = time.perf_counter() - begin - drafting.compile_s
    drafting.end(state)
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


def announce(policy: Policy, budget: int, length: int, config: ModelConfig) -> None:
    """Warns of what the user asked for and will not quite get."""
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


def _full_bytes(cache: KVCache, tokens: int) -> int:
    """Bytes of a cache of the same kind that evicts nothing."""
    return cache.bytes // cache.slots * round_up(tokens, SLOT_MULTIPLE)


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Scored(NamedTuple):
    """What a policy thinks of every prompt entry."""

    scores: jax.Array  # [L, B, K, T] float32
    kept: jax.Array  # [L, B, K, C] int32 ascending positions, -1 padded
    logits: jax.Array  # [B, V] float32 after the last prompt token


def score(
    model: Model,
    tokens: np.ndarray,
    *,
    policy: Policy | None = None,
    budget: int = DEFAULT_BUDGET,
    lookahead: LookaheadModules | None = None,
) -> Scored:
    """Scores every prompt entry and selects `budget` per layer and KV head; decodes nothing.

    `tokens` is int32 [B, T], right-padded with -1. Raises ValueError if it is not, or if an id
    is out of range.
    """
    check_tokens(tokens, config=model.config)
    policy = policy or default_policy(lookahead)
    announce(policy, budget, tokens.shape[1], model.config)
    width = tokens.shape[1]
    padded = np.full((len(tokens), bucket_length(width)), -1, np.int32)
    padded[:, :width] = tokens
    result = read_prompt(
        model.params, jnp.asarray(padded), config=model.config, policy=policy, budget=budget,
        new_tokens=0, modules=lookahead, eos_ids=model.generation.eos_ids, with_scores=True,
    )  # fmt: skip
    most = int(np.max(np.asarray(result.cache.length)))
    scores = cast(jax.Array, result.scores)  # asked for
    return Scored(scores[..., :width], result.cache.pos[..., :most], result.logits)


def token_logits(
    params: Params, tokens: Int[Array, "B T"], *, config: ModelConfig
) -> Float[Array, "B T V"]:
    """Float32 next-token logits at every position of a right-padded batch; keeps no cache."""
    return logits(params, hidden_states(params, tokens, config=config), config=config)
