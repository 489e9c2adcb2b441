"""Prompts on their way into a row: read, or found among those that an earlier request had read."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.eviction import DecodeEviction, opening_sums
from lookahead_jax.decoding.sampling import GREEDY, Sampling, SamplingRows, sampling_rows
from lookahead_jax.engine.prompt_store import PromptStore, Read
from lookahead_jax.engine.requests import MAX_EOS_IDS, Limits
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.rope import span_class
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy
from lookahead_jax.prefilling.batching import bucket_length, pad_batch
from lookahead_jax.prefilling.prefill import Prefilled, extend
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt


def with_everything(rows: SamplingRows) -> SamplingRows:
    """Rows for a program that has every setting: what no row asks for is skipped at run time."""
    return dataclasses.replace(rows, sampled=True, filtered=True, penalized=True)


class Opening(NamedTuple):
    """A prompt that has been read, and how its request goes on; one row of everything."""

    prompt: jax.Array  # [1, T] int32
    cache: KVCache
    logits: jax.Array  # [1, V] float32 after the prompt
    sums: jax.Array | None  # [L, 1, K, S] float32, see decode_eviction.opening_sums
    sampling: SamplingRows
    limit: jax.Array  # [1] int32
    eos: jax.Array  # [1, E] int32


@partial(jax.jit, static_argnames=("slots",))
def _widened(cache: KVCache, *, slots: int) -> KVCache:
    """A copy of a cache with more slots, the new ones empty."""
    spare = [(0, 0)] * 3 + [(0, slots - cache.slots)]
    wide = dataclasses.replace(
        cache,
        k=jnp.pad(cache.k, [*spare, (0, 0)]),
        v=jnp.pad(cache.v, [*spare, (0, 0)]),
        pos=jnp.pad(cache.pos, spare, constant_values=-1),
    )
    return jax.tree.map(jnp.copy, wide)  # what is returned unchanged would be the caller's own


class PromptReader:
    """Reads the prompts of an engine, each alone, and keeps some of them for the next request."""

    def __init__(
        self,
        model: Model,
        limits: Limits,
        store: PromptStore,
        *,
        policy: Policy,
        budget: int,
        modules: LookaheadModules | None,
        eviction: DecodeEviction | None,
    ):
        self._model = model
        self._limits = limits
        self._store = store
        self._policy = policy
        self._budget = budget
        self._modules = modules
        self._eviction = eviction
        width, new = bucket_length(limits.max_prompt_tokens), limits.max_new_tokens
        room = new if eviction is None else eviction.room(width, new, model.config)
        largest = jax.eval_shape(
            lambda tokens: self._prefill(tokens, 0, limits.max_question_tokens + room, ()),
            jax.ShapeDtypeStruct((1, width), jnp.int32),
        )
        self.slots: int = largest.cache.slots
        """Cache slots that a row needs for the longest prompt, its question and its output."""

    def read(
        self,
        tokens: Sequence[int],
        new_tokens: int,
        sampling: Sampling,
        seed: int,
        eos_ids: Sequence[int],
        *,
        document: int = 0,
    ) -> tuple[Opening, int]:
        """Reads a prompt and cuts its cache, and how many tokens of it had been read before.

        The first `document` tokens are read and cut on their own.
        """
        config = self._model.config
        if document:
            head, question = tokens[:document], tokens[document:]
            read, reused = self._kept(head, len(question), eos_ids)
            asked = jnp.asarray(pad_batch([question], config=config))
            # All of a row's slots, all of a row's tokens: one program inserts every question.
            cache = _widened(read.cache, slots=self.slots)
            cache, logits = extend(self._model.params, asked, cache, config=config)
            read = Read(cache, logits, read.sums)
            prompt = np.full((1, bucket_length(self._limits.longest)), -1, np.int32)
            prompt[0, : len(tokens)] = tokens
        else:
            read, reused = self._kept(tokens, 0, eos_ids)
            prompt = pad_batch([tokens], config=config)
        opening = Opening(
            prompt=jnp.asarray(prompt),
            # Waits, so that an error belongs to this request; no room, the batch has it.
            **jax.block_until_ready(read)._asdict(),
            sampling=with_everything(sampling_rows([sampling], [seed], config.vocab_size)),
            limit=jnp.asarray([new_tokens], jnp.int32),
            eos=jnp.asarray([_padded(eos_ids)], jnp.int32),
        )
        return opening, reused

    def samples(self, lengths: Iterable[int]) -> Iterator[Opening]:
        """One opening for every program that prompts of `lengths` tokens use; none is kept."""
        longest, question = self._limits.max_prompt_tokens, self._limits.max_question_tokens
        shapes = [(min(width, longest), 0) for width in _buckets(lengths)]
        if question:
            shapes += [(length, 1) for length, _ in shapes]
            shapes += [(1, min(width, question)) for width in _buckets(range(1, question + 1))]
        for first, behind in shapes:
            tokens = [0] * (first + behind)
            yield self.read(tokens, 1, GREEDY, 0, (), document=first if behind else 0)[0]
            self._store.clear()

    def _kept(
        self, tokens: Sequence[int], known_tokens: int, eos_ids: Sequence[int]
    ) -> tuple[Read, int]:
        """A prompt that is read, by an earlier request or now, and how much was read earlier.

        `known_tokens` of a question will be read behind it.
        """
        # All that the reading depends on: RoPE on the known length, two-pass policies on ends.
        span = span_class(self._model.config, len(tokens) + known_tokens)
        key = (np.asarray(tokens, np.int32).tobytes(), span, tuple(eos_ids))
        if (kept := self._store.get(key)) is not None:
            return kept, len(tokens)
        prompt = jnp.asarray(pad_batch([tokens], config=self._model.config))
        full = jax.block_until_ready(self._prefill(prompt, known_tokens, 0, eos_ids))
        read = Read(full.cache, full.logits, opening_sums(self._eviction, full))
        self._store.put(key, read)
        return read, 0

    def _prefill(
        self, tokens: jax.Array, known_tokens: int, room: int, eos_ids: Sequence[int]
    ) -> Prefilled:
        return read_prompt(
            self._model.params, tokens, config=self._model.config, policy=self._policy,
            budget=self._budget, new_tokens=room, known_tokens=known_tokens, modules=self._modules,
            eos_ids=_padded(eos_ids),
            with_scores=self._eviction is not None and self._eviction.adds_up,
            repeat_template=repeat_template(self._policy, self._model.tokenizer),
        )  # fmt: skip


def _padded(eos_ids: Sequence[int]) -> tuple[int, ...]:
    return (*eos_ids, *[-1] * (MAX_EOS_IDS - len(eos_ids)))


def _buckets(lengths: Iterable[int]) -> list[int]:
    return sorted({bucket_length(length) for length in lengths})
