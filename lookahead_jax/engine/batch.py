"""The batch that an engine decodes: a fixed number of rows, each empty or used by one request.

Every array has its final size from the beginning, so a request compiles nothing but the reading
of its prompt, once per padded length.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, UInt32

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.constraints import everything
from lookahead_jax.decoding.device_drafter import DeviceDrafter, NoDrafter
from lookahead_jax.decoding.draft_programs import check_devices
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.logprobs import (
    MAX_ALTERNATIVES,
    LogprobRecord,
    Logprobs,
    empty_record,
    on_host,
)
from lookahead_jax.decoding.node_budget import PLACES
from lookahead_jax.decoding.placement import placed
from lookahead_jax.decoding.sampling import GREEDY, sampling_rows, with_everything
from lookahead_jax.decoding.state import DecodeState, seen_tokens, start
from lookahead_jax.decoding.tree import NODE_BUCKETS
from lookahead_jax.engine.prompt_reader import PrefilledRequest
from lookahead_jax.engine.requests import MAX_EOS_IDS
from lookahead_jax.model.cache import CacheType, empty_cache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params


def empty_batch(
    params: Params,
    *,
    config: ModelConfig,
    batch: int,
    slots: int,
    width: int,
    ends: int,
    draft: Any,
    summed: bool,
    pins: int,
    question: int,
    cache_dtype: CacheType | None,
) -> DecodeState:
    """A batch in which nothing runs, with room for `width` tokens and `ends` end tokens a row.

    `summed` says that the policy adds up scores while decoding, `pins` of how many positions
    decoding knows which are pinned, `question` how many of a prompt's tokens it reads again. All
    arrays are placed where the parameters are: an uncommitted array would compile the first steps
    once more.
    """

    def zeros(dtype=jnp.int32):
        return jnp.zeros(batch, dtype)

    cache = empty_cache(config, batch, slots, cache_dtype or params["embed"].dtype, zeros())
    state = DecodeState(
        cache=cache,
        token=zeros(),
        tokens=jnp.full((batch, width), -1, jnp.int32),
        count=zeros(),
        limit=zeros(),
        done=jnp.ones(batch, bool),
        eos=jnp.full((batch, ends), -1, jnp.int32),
        seen=jnp.zeros((batch, config.vocab_size), bool),
        counts=jnp.zeros((batch, config.vocab_size), jnp.int32),
        sampling=with_everything(sampling_rows([GREEDY] * batch, [0] * batch, config.vocab_size)),
        lengths=jnp.zeros((batch, NODE_BUCKETS[-1]), jnp.int32),
        reached=jnp.zeros((batch, len(NODE_BUCKETS)), jnp.int32),
        places=jnp.zeros((batch, 2, PLACES), jnp.int32),
        finite=jnp.ones(batch, bool),
        draft=draft,
        sums=jnp.zeros(cache.pos.shape, jnp.float32) if summed else None,
        pinned=jnp.zeros((batch, pins), bool) if pins else None,
        question=jnp.full((batch, question), -1, jnp.int32) if question else None,
        logprobs=_logprob_record(jnp.zeros(batch, bool), width, config),
        drafted=jnp.ones(batch, bool),
    )
    place = params["embed"].sharding
    if not isinstance(place, NamedSharding):
        return jax.device_put(state, place)
    return placed(state, params)


@partial(jax.jit, static_argnames=("config", "drafter"), donate_argnames=("state",))
def insert_row(
    state: DecodeState,
    weights: Any,
    row: Int[Array, ""],
    request: PrefilledRequest,
    allowed: UInt32[Array, "1 W"],
    *,
    config: ModelConfig,
    drafter: DeviceDrafter,
) -> DecodeState:
    """Puts a request into row `row` with the cache of its prompt, and emits its first token.

    `allowed` is the mask of that token. The other rows are unchanged. The prompt's cache may have
    fewer slots than `state`: the other slots of the row are marked as empty. `state` is donated.
    """
    new = start(
        request.cache, request.logits, sampling=request.sampling, limit=request.limit,
        eos=request.eos, seen=seen_tokens(request.prompt, config.vocab_size),
        width=state.tokens.shape[1], pinned=request.pinned, drafted=request.drafted,
        question=request.question,
        logprobs=_logprob_record(request.with_logprobs, state.tokens.shape[1], config),
        allowed=allowed,
    )  # fmt: skip

    def pad(slots, empty):
        spare = state.cache.slots - slots.shape[-1]
        return jnp.pad(slots, [(0, 0)] * 3 + [(0, spare)], constant_values=empty)

    pos = pad(new.cache.pos, -1)
    sums = None if state.sums is None else pad(request.sums, 0.0)

    def put(axis, whole, one):
        return jax.lax.dynamic_update_slice_in_dim(whole, one, row, axis)

    # Arrays of the cache begin with layers, except those with one entry per row.
    cache, sums = jax.tree.map(
        lambda whole, one: put(min(whole.ndim - 1, 1), whole, one),
        (state.cache, state.sums),
        (dataclasses.replace(new.cache, pos=pos), sums),
    )
    rest = jax.tree.map(
        partial(put, 0),
        dataclasses.replace(state, cache=None, draft=None, sums=None),
        dataclasses.replace(new, cache=None, draft=None),
    )
    draft = drafter.begin(weights, state.draft, row[None], request.prompt)
    return dataclasses.replace(rest, cache=cache, draft=draft, sums=sums)


def _logprob_record(asked: jax.Array, width: int, config: ModelConfig) -> LogprobRecord:
    """A record for rows of which those in `asked` [B] want log-probabilities."""
    most = min(MAX_ALTERNATIVES, config.vocab_size)
    return empty_record(asked, width=width, alternatives=most)


class RunningBatch:
    """The decoding state of all rows; which request has which row is known to the engine.

    `params` are the model's as decoding reads them (`for_decoding`).
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        drafting: Drafting,
        *,
        rows: int,
        slots: int,
        new_tokens: int,
        summed: bool,
        pins: int,
        question: int,
        cache_dtype: CacheType | None = None,
    ):
        self._model = model
        self._drafting = drafting
        self._size = rows
        self._slots = slots
        self._new_tokens = new_tokens
        self._summed = summed
        self._pins = pins
        self._question = question
        self._cache_dtype: CacheType | None = cache_dtype
        self._params = params
        self._anything = everything(1, vocab_size=model.config.vocab_size)
        self._halted: set[int] = set()
        self.clear()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the rows' caches."""
        return self._state.cache.bytes

    def clear(self) -> None:
        """Empties every row, even where an error has left the state unusable."""
        self._halted.clear()
        self._state = empty_batch(
            self._model.params,
            config=self._model.config,
            batch=self._size,
            slots=self._slots,
            width=self._new_tokens,
            ends=MAX_EOS_IDS,
            draft=self._drafting.empty(),
            summed=self._summed,
            pins=self._pins,
            question=self._question,
            cache_dtype=self._cache_dtype,
        )

    def insert(
        self, row: int, request: PrefilledRequest, allowed: np.ndarray | None = None
    ) -> None:
        """Puts a request into a free row and emits its first token.

        `allowed` is the mask of that token, uint32 [W]; None: any. Raises ValueError for a draft
        model on other devices than the target.
        """
        drafter = self._drafting.device
        check_devices(drafter.weights, request.cache)
        # The tree of a host drafter belongs to the last step; its shape may differ in the next.
        plain = isinstance(drafter, NoDrafter)
        state = insert_row(
            dataclasses.replace(self._state, draft=()) if plain else self._state,
            drafter.weights,
            jnp.asarray(row, jnp.int32),
            request,
            self._anything if allowed is None else allowed[None],
            config=self._model.config,
            drafter=drafter,
        )
        self._state = placed(state, self._params)
        self._halted.discard(row)

    def advance(self, steps: int) -> None:
        """Decodes a burst of up to `steps` steps; one step if the host drafts."""
        if self._halted:
            done = np.array(self._state.done)
            done[list(self._halted)] = True
            # Placed as before: an uncommitted array would compile the step once more.
            done = jax.device_put(done, self._state.done.sharding)
            self._state = dataclasses.replace(self._state, done=done)
            self._halted.clear()
        self._state = self._drafting.advance(self._params, self._state, steps)

    def halt(self, row: int) -> None:
        """Ends a row before the next step."""
        self._halted.add(row)

    def look(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Each row's tokens [B, W], their number [B], whether it is done [B], its steps [B].

        The last array [B] says whether all logits of the row were finite.
        """
        state = self._state
        tokens, count, done, lengths, finite = jax.device_get(
            (state.tokens, state.count, state.done, state.lengths, state.finite)
        )
        return tokens, count, done, lengths.sum(1), finite

    def logprobs(self, row: int) -> Logprobs:
        """Log-probabilities of a row that asked for them, for all places of its tokens."""
        if self._state.logprobs is None:
            raise ValueError("the batch has no record of log-probabilities")
        return on_host(self._state.logprobs, row)

    def warm_up(self, requests: Iterable[PrefilledRequest], steps: int, *, grammars: bool) -> None:
        """Compiles what requests like these need. Only while nothing runs."""
        for request in requests:
            self.insert(0, request._replace(limit=jnp.zeros(1, jnp.int32)))
        self.logprobs(0)
        self._state = self._drafting.warm_up(self._params, self._state, steps, grammars=grammars)
