"""Prompts -> the best of several continuations: `lk.search`."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.device_drafter import DeviceDrafter, NoDrafter
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.sampling import Sampling, sampling_rows
from lookahead_jax.decoding.state import seen_tokens, start
from lookahead_jax.generation.inputs import (
    DEFAULT_BUDGET,
    PromptBatch,
    announce,
    check_eviction,
    default_policy,
    draft_tokens,
    encode_batch,
    end_ids,
    row_seeds,
)
from lookahead_jax.generation.memory import check_memory
from lookahead_jax.generation.open_batch import read_batch, reading
from lookahead_jax.generation.output_text import FinishReason
from lookahead_jax.generation.settings import ContinuationSettings, DraftSettings, EvictionSettings
from lookahead_jax.model.cache import cache_type
from lookahead_jax.model.growth import warn_of_crossing
from lookahead_jax.model.sharding import on_its_mesh
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.modules.reward_head import RewardHead
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.full import Full
from lookahead_jax.strategies.base import Ranked, Strategy
from lookahead_jax.strategies.drafted_rows import DraftedRows, check_drafter
from lookahead_jax.strategies.guides import (
    check_guides,
    checked_sampling,
    checked_verifier,
    work_limits,
)
from lookahead_jax.strategies.registry import make_strategy
from lookahead_jax.strategies.rows import Reward, Router, Rows, Verifier, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One continuation that a search has ended with."""

    tokens: list[int]  # an end-of-sequence token included
    text: str | None  # without special tokens, cut before a stop string; None: no tokenizer
    finish: FinishReason
    score: float | None  # by which the strategy compares; None: it compares nothing in the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The outcome of a search; every list has one entry for each prompt (or question)."""

    tokens: list[list[int]]  # of the chosen continuation
    text: list[str] | None
    finish: list[FinishReason]
    chosen: list[int]  # its place among the candidates
    candidates: list[list[Candidate]]
    work: list[Work]
    prompt_tokens: list[int]
    cache_bytes: int  # allocated: the prompts once for each model, and what each row may write


@on_its_mesh
def search(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    strategy: str | Strategy,
    reward: Reward | None = None,
    router: Router | None = None,
    verifier: Verifier | None = None,
    draft_model: Model | None = None,
    questions: Sequence[str | Sequence[int]] | None = None,
    pin: Sequence[Sequence[tuple[int, int]]] | None = None,
    policy: Policy | None = None,
    budget: int = DEFAULT_BUDGET,
    max_new_tokens: int = 128,
    most_tokens: int | None = None,
    most_forwards: int | None = None,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    lookahead: LookaheadModules | None = None,
    drafts: Sequence[Sequence[int]] | Model | None = None,
    eos_ids: Sequence[int | str] | None = None,
    stop_token_ids: Sequence[int | str] = (),
    drafter: str | HostDrafter | DeviceDrafter = "none",
    draft_nodes: int | Controller | None = None,
    cache_dtype: str | None = None,
) -> SearchResult:
    """Continues each prompt by a strategy that searches: in several rows, or several times.

    Each prompt is read and cut once, as by `lk.generate`; its rows share those entries and add only
    what they write. The answer to a prompt depends on its own seed, not on the other prompts.

    Args:
      strategy: a name, or `lk.make_strategy(name, ...)` with settings.
      reward: `reward(prompt, text)`, a number for a continuation as far as it has come; larger is
        better. Or `lk.reward_head(...)`, by the hidden states of `model`. For the strategies that
        compare by it.
      router: `router(text, step)`, by how much the model's step would be better than `step`, which
        the draft model has added to `text`. Arbitrage takes it instead of a reward.
      verifier: `verifier(prompt, answer, earlier)`, the probability that a thought of TrimR answers
        the prompt (`earlier` None), or that it agrees with an earlier one. Default:
        `lk.model_verifier(model)`.
      draft_model: a smaller model with the same tokens, which Arbitrage needs. It keeps all of its
        prompts.
      max_new_tokens: of each row.
      most_tokens: of all rows of a prompt together, those that are given up included. A prompt ends
        where a step of all its rows would exceed it. Those of a draft model count as well.
      most_forwards: steps of the model, and of a draft model, for a prompt, whatever the number of
        its rows. A reward head needs one for each score.
      sampling: default: the strategy's own.
      seeds: one per prompt (or question), default 0 for all. The first row of a prompt draws the
        same noise as `lk.generate` with that seed.
      drafter: as that of `lk.generate`, for strategies that draw whole samples: best_of_n,
        self_consistency, first_finish and the particles. The texts are the same, unless
        `most_forwards` ends them; `Work.forwards` shows the gain.

    The other arguments are those of `lk.generate`; no entry of a prompt is evicted while decoding.

    Raises ValueError as `lk.generate` does, and for a strategy without the reward or the sampling
    that it needs, or with a reward, a sampling or a drafter that it has no use for.
    """
    strategy = make_strategy(strategy) if isinstance(strategy, str) else strategy
    sampling = checked_sampling(strategy, sampling)
    check_guides(strategy, reward, router, draft_model, model)
    verifier = checked_verifier(strategy, verifier, model)
    draft = DraftSettings.of(drafter, draft_nodes)
    check_drafter(strategy, draft.drafter)
    strategy = strategy.for_model(model)
    sides = 2 if strategy.routes else 1  # texts that one decision compares
    reserve = sides if isinstance(reward, RewardHead) else 0
    limits = work_limits(most_tokens, most_forwards, strategy.rows * sides, max(reserve, 1))
    eviction = EvictionSettings(
        policy=policy or default_policy(lookahead), budget=budget, modules=lookahead,
        cache_dtype=cache_type(cache_dtype),
    )  # fmt: skip
    check_eviction(eviction, by_reader=False, questions=questions is not None)
    batch = encode_batch(model, prompts, questions, pin)
    config = model.config
    settings = ContinuationSettings(
        max_new_tokens=max_new_tokens, sampling=sampling,
        seeds=row_seeds(seeds, len(batch.texts)),
        eos_ids=end_ids(model, eos_ids, stop_token_ids),
    )  # fmt: skip
    drafting = Drafting(
        draft.drafter, draft.nodes, config=config, batch=len(batch.texts) * strategy.rows,
        room=batch.longest + max_new_tokens,
    )  # fmt: skip
    drafts_for = None if type(draft.drafter) is NoDrafter else drafting
    drafted = draft_tokens(
        eviction.policy, drafts, batch.prompts, eos_ids=settings.eos_ids, drafter=draft.drafter
    )
    shared: dict[str, Any] = dict(
        stop=stop, limits=limits, reward=reward, reserve=reserve, router=router,
        verifier=verifier,
    )  # fmt: skip
    beside = None
    if draft_model is not None:
        whole = EvictionSettings(policy=Full(), budget=budget)
        beside = _opened(draft_model, batch, settings, whole, strategy, **shared)
    rows = _opened(
        model, batch, settings, eviction, strategy, drafts=drafted, beside=beside,
        drafting=drafts_for, **shared,
    )  # fmt: skip
    cache_bytes = rows.state.cache.bytes + (0 if beside is None else beside.state.cache.bytes)
    try:
        ranked = strategy.run(rows)
    except BaseException:
        drafting.abandon()
        raise
    rows.close()
    written = np.array([len(o.tokens) for o in rows.outputs]).reshape(-1, strategy.rows)
    written = np.minimum(written, strategy.slots(max_new_tokens))
    longest = written.sum(1) if strategy.concurrent else written.max(1)
    lengths = [len(text) for text in batch.texts]
    warn_of_crossing(lengths, (np.array(lengths) + longest - 1).tolist(), config=config)
    return _result(rows, ranked, [len(row) for row in batch.row_prompts], cache_bytes)


def _opened(
    model: Model,
    batch: PromptBatch,
    settings: ContinuationSettings,
    eviction: EvictionSettings,
    strategy: Strategy,
    *,
    stop: Sequence[str],
    limits: Work,
    reward: Reward | None,
    reserve: int,
    router: Router | None,
    verifier: Verifier | None,
    drafts: jax.Array | None = None,
    beside: Rows | None = None,
    drafting: Drafting | None = None,
) -> Rows:
    """The prompts read and branched, with the first token of every row."""
    copies, config, new_tokens = strategy.rows, model.config, settings.max_new_tokens
    slots = strategy.slots(new_tokens)
    # A row's slots are those of the prompt it shares, and its own.
    check_memory(
        model, eviction, rows=len(batch.texts), prompt_tokens=batch.longest,
        new_tokens=copies * slots,
    )  # fmt: skip
    follows = slots * (copies if strategy.concurrent else 1)
    longest = batch.longest + eviction.staying + follows
    announce(eviction.policy, eviction.budget, longest, config)
    with reading(sum(map(len, batch.texts)), config):
        opened = read_batch(
            model, batch, eviction, new_tokens=0, eos_ids=settings.eos_ids, drafts=drafts
        )
        logits = jnp.repeat(opened.logits, copies, axis=0)
        texts = jnp.repeat(batch.text_tokens, copies, axis=0)
        steer, steering = strategy.steering(texts, new_tokens, settings.sampling, config.vocab_size)
        if steer is not None:
            last = [row[-1] for row in batch.texts for _ in range(copies)]
            steering, logits = jax.jit(steer)(steering, logits, jnp.asarray(last, jnp.int32))
        packed = sampling_rows(
            [settings.sampling] * len(logits),
            place_seeds(settings.seeds, copies),
            config.vocab_size,
        )
        state = start(
            opened.cache.branch(copies, slots=slots, concurrent=strategy.concurrent),
            logits,
            sampling=packed,
            limit=jnp.full(len(logits), new_tokens, jnp.int32),
            eos=jnp.asarray(settings.eos_ids, jnp.int32),
            seen=seen_tokens(texts, config.vocab_size) if packed.penalized else None,
            width=new_tokens,
        )
        if state.done.committed:  # what is not placed as the rest compiles the second burst anew
            steering = jax.device_put(steering, state.done.sharding)
        state = jax.block_until_ready(dataclasses.replace(state, steering=steering))
    made = Rows if drafting is None else partial(DraftedRows, drafting=drafting)
    return made(
        model, batch.texts, state, logits, copies=copies, seeds=settings.seeds,
        ends=settings.eos_ids, stop=stop, limits=limits, steer=steer, reward=reward,
        reserve=reserve, router=router, verifier=verifier, beside=beside,
    )  # fmt: skip


def _result(
    rows: Rows, ranked: Sequence[Ranked], prompt_tokens: list[int], cache_bytes: int
) -> SearchResult:
    for output in rows.outputs:
        output.close()
    spoken = rows.model.tokenizer is not None
    candidates = []
    for group, ranking in zip(rows.groups, ranked, strict=True):
        outputs = [rows.outputs[row] for row in group[: len(ranking.scores)]]
        candidates.append(
            [
                Candidate(
                    tokens=output.tokens, text=output.text if spoken else None,
                    finish=output.finish(), score=score,
                )
                for output, score in zip(outputs, ranking.scores, strict=True)
            ]
        )  # fmt: skip
    chosen = [row[ranking.best] for row, ranking in zip(candidates, ranked, strict=True)]
    return SearchResult(
        tokens=[c.tokens for c in chosen],
        text=[str(c.text) for c in chosen] if spoken else None,
        finish=[c.finish for c in chosen],
        chosen=[ranking.best for ranking in ranked],
        candidates=candidates,
        work=rows.spent,
        prompt_tokens=prompt_tokens,
        cache_bytes=cache_bytes,
    )


def place_seeds(seeds: Sequence[int], copies: int) -> list[int]:
    """A seed for every row: that of its prompt for the first, others drawn from it for the rest."""
    return [
        seed
        if not place
        else int(np.random.SeedSequence([seed % 2**32, place]).generate_state(1)[0])
        for seed in seeds
        for place in range(copies)
    ]
