"""Reads the prompts of requests, or takes them from the store of earlier readings.

A prompt is read alone, or together with other short ones: the weights are then read from memory
once for all of them.
"""

import dataclasses
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.eviction import (
    DecodeEviction,
    opening_question,
    opening_sums,
    pinned_memory,
)
from lookahead_jax.decoding.sampling import (
    GREEDY,
    SamplingRows,
    sampling_rows,
    with_everything,
)
from lookahead_jax.engine.prefix_store import PrefixStore
from lookahead_jax.engine.prompt_store import PromptStore, StoredPrompt
from lookahead_jax.engine.requests import MAX_EOS_IDS, EncodedRequest, Limits
from lookahead_jax.generation.settings import EvictionSettings
from lookahead_jax.model.cache import KVCache, widened
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import span_class
from lookahead_jax.policies.base import WithCuts
from lookahead_jax.prefilling.batching import bucket_length, pad_batch, pin_mask
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt, read_prompt_in_pieces
from lookahead_jax.prompts.sharing import (
    Shared,
    has_pieces,
    part_bytes,
    reusable_parts,
    shared_tokens,
)

TOGETHER = 4
"""Prompts of one reading, at most."""
_FEWEST_TOGETHER = 3  # two readings take no longer than one of four rows, where rows are arithmetic


class PrefilledRequest(NamedTuple):
    """A request whose prompt has been read, as one row of a batch's arrays."""

    prompt: jax.Array  # [1, T] int32
    cache: KVCache
    logits: jax.Array  # [1, V] float32 after the prompt
    sums: jax.Array | None  # [L, 1, K, S] float32, see decoding.eviction.opening_sums
    pinned: jax.Array | None  # [1, T'] bool, where decoding evicts: see `PromptReader.pins`
    question: jax.Array | None  # [1, Q] int32, see decoding.eviction.opening_question
    sampling: SamplingRows
    limit: jax.Array  # [1] int32
    eos: jax.Array  # [1, E] int32
    drafted: jax.Array  # [1] bool
    with_logprobs: jax.Array  # [1] bool


class ReadRequest(NamedTuple):
    """A request whose prompt has been read, and what that took."""

    prefilled: PrefilledRequest
    reused: int  # tokens that a store had
    kept: float  # entries of the prompt, mean over layers and KV heads


class PromptReader:
    """Reads the prompts of an engine with one policy, and stores some of them for later requests.

    `rows` are those of the engine: with fewer than `TOGETHER`, each prompt is read alone. `params`
    are the model's as decoding reads them (`for_decoding`): pieces need no copy then.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        settings: EvictionSettings,
        *,
        rows: int,
        limits: Limits,
        store: PromptStore,
        prefixes: PrefixStore,
        decode_eviction: DecodeEviction | None,
    ):
        self._model = model
        self._params = params
        self._limits = limits
        self._store = store
        self._prefixes = prefixes
        self._settings = settings
        self._eviction = decode_eviction
        policy = settings.policy
        width, room = bucket_length(limits.max_prompt_tokens), limits.max_new_tokens
        self._longest = width
        self._part = shared_tokens(policy, model.config)
        size = part_bytes(
            params, config=model.config, policy=policy, budget=settings.budget, longest=width,
            cache_dtype=settings.cache_dtype,
        )  # fmt: skip
        self._most_parts = prefixes.limit // size if self._part else 0
        self._cuts = isinstance(policy.reading, WithCuts)
        self._together = TOGETHER if rows >= TOGETHER and has_pieces(policy) else 1
        if decode_eviction is not None:
            room = decode_eviction.room(width, room, model.config)
        self.slots: int = self._slots(width, limits.max_question_tokens + room)
        """Cache slots that a row needs for the longest prompt, its question and its output."""
        self.pins: int = 0 if decode_eviction is None else width + decode_eviction.staying
        """Positions of a row that decoding has to know the pinned ones of."""

    def _slots(self, width: int, room: int) -> int:
        """Slots of the cache of a prompt of `width` tokens, with `room` more."""
        settings = self._settings
        read = partial(
            read_prompt, config=self._model.config, policy=settings.policy,
            budget=settings.budget, new_tokens=room, modules=settings.modules,
            eos_ids=_padded(()),
            repeat_template=repeat_template(settings.policy, self._model.tokenizer),
            cache_dtype=settings.cache_dtype,
        )  # fmt: skip
        tokens = jax.ShapeDtypeStruct((1, width), jnp.int32)
        return jax.eval_shape(read, self._model.params, tokens).cache.slots

    def together(self, requests: Sequence[EncodedRequest]) -> int:
        """How many of these requests, from the first on, `read` should be given next.

        Several if their prompts are short, and neither equal nor stored; else one.
        """
        keys = set[Hashable]()
        for request in requests[: self._together]:
            if request.document or not _short(len(request.tokens)):
                break
            key = self._key(request, 0)
            if key in keys or key in self._store:
                break
            keys.add(key)
        return len(keys) if len(keys) >= _FEWEST_TOGETHER else 1

    def read(self, requests: Sequence[EncodedRequest]) -> Generator[None, None, list[ReadRequest]]:
        """Requests with their prompts read and cut.

        It yields between pieces of the prompts. A document is read and cut on its own; the rest of
        the prompt is read after it. Several requests have to be such as `together` allows.
        """
        if len(requests) > 1:
            reused = [0] * len(requests)
            stored = yield from self._read_several(requests)
        else:
            behind = self._read_behind_document if requests[0].document else self._stored
            one, known = yield from behind(requests[0])
            stored, reused = [one], [known]
        # Waits, so that an error belongs to these requests.
        jax.block_until_ready(stored)
        return [
            ReadRequest(self._prefilled(request, one), known, self._kept(one))
            for request, one, known in zip(requests, stored, reused, strict=True)
        ]

    def _kept(self, stored: StoredPrompt) -> float:
        """Entries of a prompt in its cut cache, mean over layers and KV heads."""
        return float(np.asarray(stored.cache.length).mean()) - self._settings.staying

    def _prefilled(self, request: EncodedRequest, stored: StoredPrompt) -> PrefilledRequest:
        rows = sampling_rows([request.sampling], [request.seed], self._model.config.vocab_size)
        return PrefilledRequest(
            **stored._asdict(),
            pinned=self._pinned_while_decoding(request),
            question=opening_question(self._eviction, [request.tokens]),
            sampling=with_everything(rows),
            limit=jnp.asarray([request.max_new_tokens], jnp.int32),
            eos=jnp.asarray([_padded(request.eos_ids)], jnp.int32),
            drafted=jnp.asarray([request.draft]),
            with_logprobs=jnp.asarray([request.logprobs is not None]),
        )

    def samples(self, lengths: Iterable[int]) -> Iterator[PrefilledRequest]:
        """One request for every program that prompts of `lengths` tokens use; none is stored."""
        longest, question = self._limits.max_prompt_tokens, self._limits.max_question_tokens
        shapes = [(min(width, longest), 0) for width in _buckets(lengths)]
        if question:
            shapes += [(length, 1) for length, _ in shapes]
            shapes += [(1, min(width, question)) for width in _buckets(range(1, question + 1))]
        for first, behind in shapes:
            request = EncodedRequest(
                tokens=[0] * (first + behind), document=first if behind else 0, max_new_tokens=1,
                sampling=GREEDY, seed=0, eos_ids=(),
            )  # fmt: skip
            another = dataclasses.replace(request, tokens=[*request.tokens[:-1], 1])
            yield self._sample([request])
            if self._most_parts:
                self._sample([another])  # finds the first parts
            self._forget()
            if self._together > 1 and not behind and _short(first):
                yield self._sample([request, another])
                self._forget()

    def _sample(self, requests: Sequence[EncodedRequest]) -> PrefilledRequest:
        pieces = self.read(requests)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value[0][0]

    def _forget(self) -> None:
        self._store.clear()
        self._prefixes.clear()

    def _read_behind_document(
        self, request: EncodedRequest
    ) -> Generator[None, None, tuple[StoredPrompt, int]]:
        """The whole prompt read, and the tokens that the store had."""
        question = request.tokens[request.document :]
        stored, reused = yield from self._stored(request, len(question))
        asked = jnp.asarray(pad_batch([question], config=self._model.config))
        yield  # the question is a piece of its own
        # With a row's final sizes of cache and prompt, one program inserts every question.
        cache = widened(stored.cache, slots=self.slots)
        cache, logits = extend(self._model.params, asked, cache, config=self._model.config)
        prompt = np.full((1, bucket_length(self._limits.longest)), -1, np.int32)
        prompt[0, : len(request.tokens)] = request.tokens
        return StoredPrompt(jnp.asarray(prompt), cache, logits, stored.sums), reused

    def _stored(
        self, request: EncodedRequest, known_tokens: int = 0
    ) -> Generator[None, None, tuple[StoredPrompt, int]]:
        """What is cut, from the store, or read now; and how many of its tokens the store had.

        `known_tokens` of a question will be read after it.
        """
        tokens, key = request.cut, self._key(request, known_tokens)
        if (stored := self._store.get(key)) is not None:
            return stored, len(tokens)
        root, parts = self._root(request, key), self._parts(tokens)
        most = reusable_parts(
            self._settings.policy, len(tokens), self._settings.budget, self._model.config
        )
        known = self._prefixes.find(root, parts[:most])
        read, fresh = yield from self._read(
            [tokens], [request.pin], request.eos_ids, known_tokens=known_tokens,
            known=known, returned=len(parts),
        )  # fmt: skip
        jax.block_until_ready(read)
        self._prefixes.put(root, parts, fresh)
        self._store.put(key, read)
        return read, len(known) * self._part

    def _read_several(
        self, requests: Sequence[EncodedRequest]
    ) -> Generator[None, None, list[StoredPrompt]]:
        """What is kept of each prompt, all read as one batch."""
        # Rows without a request repeat the last one: there is one program for every number.
        batch = [*requests, *[requests[-1]] * (self._together - len(requests))]
        read, _ = yield from self._read(
            [request.tokens for request in batch], [request.pin for request in batch], ()
        )
        rows = [_row(read, i) for i in range(len(requests))]
        for request, stored in zip(requests, rows, strict=True):
            key = self._key(request, 0)
            self._store.get(key)  # counts the miss
            self._store.put(key, stored)
        return rows

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        pins: Sequence[Sequence[tuple[int, int]]],
        eos_ids: Sequence[int],
        *,
        known_tokens: int = 0,
        known: Sequence[Shared] = (),
        returned: int = 0,
    ) -> Generator[None, None, tuple[StoredPrompt, Sequence[Shared]]]:
        """What is kept of a batch of prompts, and the `returned` first parts that are new."""
        settings, config = self._settings, self._model.config
        tokens = pad_batch(prompts, config=config)
        prompt = jnp.asarray(tokens)
        read = yield from read_prompt_in_pieces(
            self._params, prompt, config=config, policy=settings.policy, budget=settings.budget,
            new_tokens=0, known_tokens=known_tokens, modules=settings.modules,
            eos_ids=_padded(eos_ids),
            with_scores=self._eviction is not None and self._eviction.adds_up,
            repeat_template=repeat_template(settings.policy, self._model.tokenizer),
            cache_dtype=settings.cache_dtype,
            # Always given, so that a request with pins compiles nothing.
            pinned=jnp.asarray(pin_mask(pins, tokens)),
            known=known, returned=returned, longest=self._longest,
        )  # fmt: skip
        full = read.prefilled
        sums = opening_sums(self._eviction, full)
        return StoredPrompt(prompt, full.cache, full.logits, sums), read.shared

    def _key(self, request: EncodedRequest, known_tokens: int) -> tuple[Hashable, ...]:
        """All that the reading of what is cut depends on, with `known_tokens` read after it.

        The first two are the tenant, and what keys and values depend on besides the tokens.
        """
        # RoPE depends on the known length, and policies that decode an answer on end tokens.
        tokens = np.asarray(request.cut, np.int32)
        span = span_class(self._model.config, len(tokens) + known_tokens)
        rest = self._settings.policy, tokens.tobytes(), request.pin, request.eos_ids
        return request.tenant, span, *rest

    def _root(self, request: EncodedRequest, key: tuple[Hashable, ...]) -> Hashable:
        """All that the parts of a prompt depend on besides the tokens up to them."""
        if not self._cuts:
            return key[:2]
        return *key[:2], self._settings.policy, request.pin

    def _parts(self, tokens: Sequence[int]) -> list[bytes]:
        """The tokens of each part that is full, as many as the store holds.

        A prompt that is one chunk and cut as a whole has none.
        """
        if not self._part or (not self._cuts and bucket_length(len(tokens)) == CHUNK):
            return []
        whole = np.asarray(tokens, np.int32)[: len(tokens) // self._part * self._part]
        parts = [part.tobytes() for part in whole.reshape(-1, self._part)]
        return parts[: self._most_parts]

    def _pinned_while_decoding(self, request: EncodedRequest) -> jax.Array | None:
        if not self.pins:
            return None
        staying = self._settings.staying
        pinned = np.zeros((1, self.pins - staying), bool)
        for start, end in request.pin:
            pinned[0, start:end] = True
        length = jnp.asarray([len(request.cut)], jnp.int32)
        return pinned_memory(jnp.asarray(pinned), length, staying)


@jax.jit
def _row(prompts: StoredPrompt, row: int | jax.Array) -> StoredPrompt:
    """One row of a batch of prompts."""

    def taken(a: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, row, 1, axis)

    sums = None if prompts.sums is None else taken(prompts.sums, 1)
    return StoredPrompt(
        taken(prompts.prompt), prompts.cache.map_rows(taken), taken(prompts.logits), sums
    )


def _short(tokens: int) -> bool:
    """Whether several prompts of so many tokens are read together: the batch is one chunk."""
    return bucket_length(tokens) * TOGETHER <= CHUNK


def _padded(eos_ids: Sequence[int]) -> tuple[int, ...]:
    return (*eos_ids, *[-1] * (MAX_EOS_IDS - len(eos_ids)))


def _buckets(lengths: Iterable[int]) -> list[int]:
    return sorted({bucket_length(length) for length in lengths})
