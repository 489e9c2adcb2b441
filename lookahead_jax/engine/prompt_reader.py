"""Reads the prompts of requests, or takes them from the store of earlier readings."""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.eviction import DecodeEviction, opening_sums
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
from lookahead_jax.prefilling.batching import bucket_length, pad_batch, pin_mask
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.prefilling.pieces import reusable_chunks
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import has_pieces, read_prompt, read_prompt_in_pieces

R = TypeVar("R")


class PrefilledRequest(NamedTuple):
    """A request whose prompt has been read, as one row of a batch's arrays."""

    prompt: jax.Array  # [1, T] int32
    cache: KVCache
    logits: jax.Array  # [1, V] float32 after the prompt
    sums: jax.Array | None  # [L, 1, K, S] float32, see decoding.eviction.opening_sums
    pinned: jax.Array | None  # [1, T'] bool, where decoding evicts: see `PromptReader.pins`
    sampling: SamplingRows
    limit: jax.Array  # [1] int32
    eos: jax.Array  # [1, E] int32
    with_logprobs: jax.Array  # [1] bool


class PromptReader:
    """Reads the prompts of an engine, each alone, and stores some of them for later requests.

    `params` are the model's as decoding reads them (`for_decoding`): pieces need no copy then.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        limits: Limits,
        store: PromptStore,
        prefixes: PrefixStore,
        settings: EvictionSettings,
        decode_eviction: DecodeEviction | None,
    ):
        self._model = model
        self._params = params
        self._limits = limits
        self._store = store
        self._prefixes = prefixes
        self._settings = settings
        self._eviction = decode_eviction
        entry = 2 * model.config.num_kv_heads * model.config.head_dim * model.config.num_layers
        chunk_bytes = CHUNK * entry * params["embed"].dtype.itemsize
        self._most_chunks = prefixes.limit // chunk_bytes if has_pieces(settings.policy) else 0
        width, room = bucket_length(limits.max_prompt_tokens), limits.max_new_tokens
        if decode_eviction is not None:
            room = decode_eviction.room(width, room, model.config)
        self.slots: int = self._slots(width, limits.max_question_tokens + room)
        """Cache slots that a row needs for the longest prompt, its question and its output."""
        self.pins: int = 0 if decode_eviction is None else width
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

    def read(self, request: EncodedRequest) -> Generator[None, None, tuple[PrefilledRequest, int]]:
        """The request with its prompt read and cut, and how many tokens the store had of it.

        It yields between pieces of the prompt. A document is read and cut on its own; the rest of
        the prompt is read after it.
        """
        config = self._model.config
        if request.document:
            stored, reused, prompt = yield from self._read_behind_document(request)
        else:
            stored, reused = yield from self._stored(request, 0)
            prompt = pad_batch([request.tokens], config=config)
        rows = sampling_rows([request.sampling], [request.seed], config.vocab_size)
        prefilled = PrefilledRequest(
            prompt=jnp.asarray(prompt),
            # Waits, so that an error belongs to this request; no room, the batch has it.
            **jax.block_until_ready(stored)._asdict(),
            pinned=self._pinned_while_decoding(request),
            sampling=with_everything(rows),
            limit=jnp.asarray([request.max_new_tokens], jnp.int32),
            eos=jnp.asarray([_padded(request.eos_ids)], jnp.int32),
            with_logprobs=jnp.asarray([request.logprobs is not None]),
        )
        return prefilled, reused

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
            yield _result(self.read(request))[0]
            if self._most_chunks:
                another = dataclasses.replace(request, tokens=[*request.tokens[:-1], 1])
                _result(self.read(another))  # finds the first chunks
            self._store.clear()
            self._prefixes.clear()

    def _read_behind_document(
        self, request: EncodedRequest
    ) -> Generator[None, None, tuple[StoredPrompt, int, np.ndarray]]:
        """The whole prompt read, the tokens that the store had, and the prompt int32 [1, T]."""
        question = request.tokens[request.document :]
        stored, reused = yield from self._stored(request, len(question))
        asked = jnp.asarray(pad_batch([question], config=self._model.config))
        yield  # the question is a piece of its own
        # With a row's final sizes of cache and prompt, one program inserts every question.
        cache = widened(stored.cache, slots=self.slots)
        cache, logits = extend(self._model.params, asked, cache, config=self._model.config)
        prompt = np.full((1, bucket_length(self._limits.longest)), -1, np.int32)
        prompt[0, : len(request.tokens)] = request.tokens
        return StoredPrompt(cache, logits, stored.sums), reused, prompt

    def _stored(
        self, request: EncodedRequest, known_tokens: int
    ) -> Generator[None, None, tuple[StoredPrompt, int]]:
        """What is cut, from the store, or read now; and how many of its tokens the store had.

        `known_tokens` of a question will be read after it.
        """
        # The reading depends on all of this: RoPE on the known length, two-pass policies on end
        # tokens.
        tokens, eos_ids = request.cut, request.eos_ids
        span = span_class(self._model.config, len(tokens) + known_tokens)
        prompt = pad_batch([tokens], config=self._model.config)
        # Always given, so that a request with pins compiles nothing.
        pinned = pin_mask([request.pin], prompt)
        root = (request.tenant, span)
        key = (*root, np.asarray(tokens, np.int32).tobytes(), pinned.tobytes(), tuple(eos_ids))
        if (stored := self._store.get(key)) is not None:
            return stored, len(tokens)
        chunks = _chunks(tokens)[: self._most_chunks]
        settings, config = self._settings, self._model.config
        most = reusable_chunks(settings.policy, len(tokens), settings.budget, config)
        known = self._prefixes.find(root, chunks[:most])
        read = yield from read_prompt_in_pieces(
            self._params, jnp.asarray(prompt), config=config, policy=settings.policy,
            budget=settings.budget, new_tokens=0, known_tokens=known_tokens,
            modules=settings.modules, eos_ids=_padded(eos_ids),
            with_scores=self._eviction is not None and self._eviction.adds_up,
            repeat_template=repeat_template(settings.policy, self._model.tokenizer),
            cache_dtype=settings.cache_dtype, pinned=jnp.asarray(pinned),
            known=known, returned=len(chunks),
        )  # fmt: skip
        full = jax.block_until_ready(read.prefilled)
        self._prefixes.put(root, chunks, read.chunks)
        result = StoredPrompt(full.cache, full.logits, opening_sums(self._eviction, full))
        self._store.put(key, result)
        return result, len(known) * CHUNK

    def _pinned_while_decoding(self, request: EncodedRequest) -> jax.Array | None:
        if not self.pins:
            return None
        pinned = np.zeros((1, self.pins), bool)
        for start, end in request.pin:
            pinned[0, start:end] = True
        return jnp.asarray(pinned)


def _result(pieces: Generator[None, None, R]) -> R:
    """What a generator returns."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def _chunks(tokens: Sequence[int]) -> list[bytes]:
    """The tokens of each chunk that is full, of a prompt that has several."""
    if bucket_length(len(tokens)) == CHUNK:
        return []
    whole = np.asarray(tokens, np.int32)[: len(tokens) // CHUNK * CHUNK]
    return [chunk.tobytes() for chunk in whole.reshape(-1, CHUNK)]


def _padded(eos_ids: Sequence[int]) -> tuple[int, ...]:
    return (*eos_ids, *[-1] * (MAX_EOS_IDS - len(eos_ids)))


def _buckets(lengths: Iterable[int]) -> list[int]:
    return sorted({bucket_length(length) for length in lengths})
