"""Continuous batching: one model, a fixed number of rows, a queue of requests.

The prompt of a waiting request is padded to a bucket, read, and its cache cut to the budget. Then
the request takes a free row of the batch while the other rows stay in place. All rows decode
together in bursts of steps, and a finished row is free for the next request. Prompts are read in
pieces, a long one alone and several short ones together: between two bursts as many pieces as the
running rows may wait for. So neither a long prompt nor many short ones can stop them. A request
compiles only what its prompt's bucket has not compiled before. Its tokens are those of `generate`
for the same prompt, settings and seed, whoever its neighbours are, up to near-ties: batches of
other shapes round differently.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.decoding.logprobs import Logprobs
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.row_error import RowError
from lookahead_jax.decoding.weights import for_decoding
from lookahead_jax.engine.batch import RunningBatch
from lookahead_jax.engine.encoding import encode_request, longest_token_bytes
from lookahead_jax.engine.opening import Opening
from lookahead_jax.engine.prefix_store import PrefixStore
from lookahead_jax.engine.prompt_reader import PrefilledRequest, PromptReader
from lookahead_jax.engine.prompt_store import PromptStore, StoreUse
from lookahead_jax.engine.queue import RequestQueue
from lookahead_jax.engine.readers import PromptReaders
from lookahead_jax.engine.requests import ActiveRequest, Event, Limits, Request, Result
from lookahead_jax.generation.inputs import announce, end_ids
from lookahead_jax.generation.memory import check_memory
from lookahead_jax.generation.settings import DraftSettings, EvictionSettings
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.cache import cache_type
from lookahead_jax.model.growth import warn_of_crossing
from lookahead_jax.model.sharding import mesh_in_use
from lookahead_jax.modules.definition import LookaheadModules, staying_entries
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prefilling.diagnosis import NonFiniteError, non_finite_error

_log = logging.getLogger(__name__)
_ADMITTING = 4  # bursts are this many times shorter while requests wait and rows are free


class Engine:
    """A queue of requests and the rows that decode them.

    `submit`, `cancel`, `wait` and the counts may be called from any thread; `step`, `run` and
    `warm_up` from one at a time. A request's callback runs in the thread that calls `step`.

    Args:
      policy: the policy of requests that name none.
      policies: those that requests may name. Every one compiles its own reading of prompts.
        Excludes evict_every, which cuts all rows with one policy.
      rows: requests that decode at the same time.
      budget: entries kept per layer and KV head of every prompt.
      max_new_tokens: the most tokens a request may ask for.
      max_prompt_tokens: the longest prompt; None: the model's positions less the new tokens.
        Policies that keep more than the budget need room for it.
      max_question_tokens: the longest prompt after a document; every row has room for it. 0: no
        documents. Excludes evict_every, which would have to score the question too.
      eos_ids: tokens that end a row unless its request names others (None: the checkpoint's).
      drafter, draft_nodes, evict_every, cache_dtype: as for `generate`; a host drafter learns from
        all requests.
      burst: the most steps before the host frees finished and cancelled rows and reads a waiting
        request.
      max_stall_s: seconds that running rows may wait between two bursts for a prompt to be read; as
        long as a decoding step takes where that is longer, up to ten times as long, so that prompts
        get half of the time. A piece of the prompt (prefilling/pieces.py) is read whole, however
        long it takes, and so are the parts of policies that read a prompt more than once.
      prompt_store_bytes: memory for prompts that have been read: an equal prompt is not read
        again. The least recently used make room. 0 keeps none.
      prefix_store_bytes: memory for the keys and values of prompts before they are cut, in chunks
        of 512 tokens: a prompt that begins with the tokens of an earlier one is read from its
        first new chunk on, with the same result. 0 keeps none. For policies that read a prompt
        once and gather nothing over its queries. Of prompts that are cut while they are read
        (policy incremental), the cut caches after as many tokens are kept instead.

    `on_pause`, if set, is called in the stepping thread before a burst that a prompt has delayed,
    with the seconds that the running rows waited.

    Raises ValueError for sizes below 1 and settings that exclude each other.
    """

    def __init__(
        self,
        model: Model,
        *,
        policy: Policy,
        policies: Mapping[str, Policy] | None = None,
        budget: int,
        rows: int,
        max_new_tokens: int,
        max_prompt_tokens: int | None = None,
        max_question_tokens: int = 0,
        lookahead: LookaheadModules | None = None,
        eos_ids: Sequence[int | str] | None = None,
        drafter: str | HostDrafter | DeviceDrafter = "none",
        draft_nodes: int | Controller | None = None,
        evict_every: int | None = None,
        cache_dtype: str | None = None,
        burst: int = 16,
        max_stall_s: float = 0.1,
        prompt_store_bytes: int = 0,
        prefix_store_bytes: int = 0,
    ):
        """Builds the engine's parts from the settings, one keyword each; hence the length."""
        for name, size in dict(rows=rows, burst=burst).items():
            check_integer(name, size, least=1)
        if not max_stall_s > 0:
            raise ValueError(f"max_stall_s must be above 0, not {max_stall_s}")
        if evict_every is not None and max_question_tokens:
            raise ValueError(
                "documents (max_question_tokens) and evict_every exclude each other: leave out one"
            )
        policies = dict(policies or {})
        used = {policy, *policies.values()}
        if evict_every is not None and len(used) > 1:
            raise ValueError("several policies and evict_every exclude each other: leave out one")
        staying = max(staying_entries(each, lookahead) for each in used)
        if max_prompt_tokens is None:
            follows = staying + max_question_tokens + max_new_tokens
            max_prompt_tokens = model.config.max_position - follows
        self.limits = Limits(
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            max_question_tokens=max_question_tokens,
            token_bytes=longest_token_bytes(model.tokenizer),
            max_pinned_tokens=None if all(isinstance(p, Full) for p in used) else budget - staying,
        )
        eviction = EvictionSettings(
            policy=policy, budget=budget, modules=lookahead, evict_every=evict_every,
            cache_dtype=cache_type(cache_dtype),
        )  # fmt: skip
        for each in used:
            check_memory(
                model, dataclasses.replace(eviction, policy=each), rows=rows,
                prompt_tokens=max_prompt_tokens, new_tokens=max_new_tokens + max_question_tokens,
                prompt_store_bytes=prompt_store_bytes, prefix_store_bytes=prefix_store_bytes,
            )  # fmt: skip
            announce(each, budget, self.limits.longest + staying + max_new_tokens, model.config)
        self.on_pause: Callable[[float], None] | None = None
        self._model = model
        self._eos_ids = end_ids(model, eos_ids)
        self._store = PromptStore(prompt_store_bytes)
        self._prefixes = PrefixStore(prefix_store_bytes)
        drafts = DraftSettings.of(drafter, draft_nodes)
        decode_eviction = eviction.while_decoding()
        params = for_decoding(model.params)
        make_reader = partial(
            PromptReader, model, params, rows=rows, limits=self.limits, store=self._store,
            prefixes=self._prefixes, decode_eviction=decode_eviction,
        )  # fmt: skip
        self._reader = PromptReaders(make_reader, eviction, policies)
        self._policies = tuple(policies)
        self._drafting = Drafting(
            drafts.drafter,
            drafts.nodes,
            config=model.config,
            batch=rows,
            room=bucket_length(self.limits.longest) + max_new_tokens,
            eviction=decode_eviction,
            modules=lookahead,
        )
        self._batch = RunningBatch(
            model, params, self._drafting, rows=rows, slots=self._reader.slots,
            new_tokens=max_new_tokens,
            summed=decode_eviction is not None and decode_eviction.adds_up,
            pins=self._reader.pins,
            question=0 if decode_eviction is None else decode_eviction.question_tokens,
            cache_dtype=eviction.cache_dtype,
        )  # fmt: skip
        self._burst = burst
        self._max_stall_s = max_stall_s
        self._step_s = 0.0  # of the last burst, per step
        self._opening: Opening | None = None
        self._rows: list[ActiveRequest | None] = [None] * rows
        self._ids = itertools.count()
        self._queue = RequestQueue()
        self._paused_s = 0.0  # of rows that ran, since the last burst

    @property
    def rows(self) -> int:
        """Requests that may decode at the same time."""
        return len(self._rows)

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies that requests may name."""
        return self._policies

    @property
    def waiting(self) -> int:
        """Requests whose prompts nobody has begun to read."""
        return self._queue.waiting

    @property
    def alive(self) -> int:
        """Requests that have not ended, waiting ones included."""
        return self._queue.alive

    @property
    def prompt_store(self) -> StoreUse:
        """Bytes of the prompts in the store, and how many of those asked for were there."""
        return self._store.use

    @property
    def prefix_store(self) -> StoreUse:
        """Bytes of the chunks in the store, and how many of those asked for were there."""
        return self._prefixes.use

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of all rows, which are allocated once."""
        return self._batch.cache_bytes

    def submit(self, request: Request) -> int:
        """Queues a request; returns its number, which events and `cancel` use.

        Raises ValueError for a request beyond this engine's limits, naming the limit.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[int]:
        """Queues requests next to each other, or, with `submit`'s ValueError, none of them."""
        encode = partial(
            encode_request, self._model, limits=self.limits, eos_ids=self._eos_ids,
            policies=self._policies,
        )  # fmt: skip
        active = [
            ActiveRequest(next(self._ids), request, encode(request), self._model.tokenizer)
            for request in requests
        ]
        self._queue.add(active)
        return [request.id for request in active]

    def cancel(self, request: int) -> bool:
        """Ends a request within a burst; False if it has ended already or is unknown."""
        return self._queue.cancel(request)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until `step` has something to do; False after `timeout` seconds without."""
        return self._queue.wait(timeout)

    def step(self) -> list[Event]:
        """Ends cancelled requests, reads pieces of a prompt, runs a burst; returns the events.

        A caller in a loop thus regains control after some reading and one burst, and
        running rows get a burst between any two readings. An error of a reading ends its requests,
        one of the drafter at one row that request; an error of the model's steps ends all that
        take part. The events say so, and the engine goes on.
        """
        events: list[Event] = []
        for request in self._queue.take_cancelled():
            self._finish(request, events, "cancelled")
        with mesh_in_use(self._model.params):
            self._serve(events)
        return events

    def run(self, requests: Sequence[Request] = ()) -> list[Result]:
        """Serves `requests` and all that wait; the results, in the order of submission."""
        self.submit_all(requests)
        results = []
        while self.alive:
            results += [event.result for event in self.step() if event.result is not None]
        return sorted(results, key=lambda result: result.id)

    def warm_up(self, lengths: Iterable[int] | None = None, *, grammars: bool = False) -> None:
        """Compiles what prompts of `lengths` tokens need (None: of every length allowed).

        `grammars`: also the steps of rows with a grammar. Raises ValueError while a request runs.
        """
        if any(self._rows) or self._opening is not None:
            raise ValueError("warm up before the first request, not while one runs")
        lengths = range(1, self.limits.max_prompt_tokens + 1) if lengths is None else lengths
        if grammars and self._model.tokenizer is not None:
            _ = self._model.tokenizer.grammar_vocabulary  # else the first request would make it
        with mesh_in_use(self._model.params):
            samples = self._reader.samples(lengths)
            self._batch.warm_up(samples, self._burst, grammars=grammars)

    def _serve(self, events: list[Event]) -> None:
        try:
            self._read_prompt(events)
            if any(self._rows):
                self._report_pause()
                steps, begin = self._steps(), time.perf_counter()
                self._batch.advance(steps)
                self._deliver(events)
                self._step_s = (time.perf_counter() - begin) / steps
        except RowError as failed:
            if (request := self._rows[failed.row]) is not None:
                _log.error("request %d ends here: %s", request.id, failed.error)
                self._finish(request, events, failed.error)
        except Exception as error:  # no request may wait for ever
            _log.exception("decoding failed; its requests end here")
            for request in [request for request in self._rows if request is not None]:
                self._finish(request, events, error)
            self._batch.clear()

    def _steps(self) -> int:
        """Steps of the next burst: one while a prompt is read, few while a request could begin."""
        if self._opening is not None:
            return 1
        begins = None in self._rows and self.waiting > 0
        return max(1, self._burst // _ADMITTING) if begins else self._burst

    def _read_prompt(self, events: list[Event]) -> None:
        """Reads on, or begins with the next requests of the queue, if rows are free."""
        self._opening = self._opening or self._open()
        if self._opening is None:
            return
        others_run, begin = any(self._rows), time.perf_counter()
        self._read_on(self._opening, events)
        if others_run:
            self._paused_s += time.perf_counter() - begin

    def _open(self) -> Opening | None:
        """Begins with the next requests of the queue; None without any, or without a free row."""
        running = [request.encoded.tenant for request in self._rows if request is not None]
        requests = self._queue.take(
            running, self.rows - len(running),
            lambda order: self._reader.together([request.encoded for request in order]),
        )  # fmt: skip
        if not requests:
            return None
        for request in requests:
            request.start()
        return Opening(requests, self._reader.read([request.encoded for request in requests]))

    def _read_on(self, opening: Opening, events: list[Event]) -> None:
        """Reads pieces of prompts; after the last their requests take free rows."""
        admitted: list[tuple[int, ActiveRequest, PrefilledRequest]] = []
        try:
            most = 10 * self._max_stall_s
            prefilled = opening.advance(max(self._max_stall_s, min(self._step_s, most)))
            if prefilled is None:
                return
            for request, read in prefilled:
                if (row := self._admit(request, events)) is not None:
                    admitted.append((row, request, read))
        except BaseException as error:
            for request in list(opening.requests):
                _log.exception("request %d could not begin", request.id)
                self._finish(request, events, error)
            if not isinstance(error, Exception):  # an interrupt of `run`
                raise
            return
        self._opening = None
        try:
            for row, request, read in admitted:
                self._batch.insert(row, read, request.first_mask)
        except KeyboardInterrupt as error:  # of `run`: no row may be left without its request
            for _, request, _ in admitted:
                self._finish(request, events, error)
            raise
        self._deliver(events)

    def _admit(self, request: ActiveRequest, events: list[Event]) -> int | None:
        """Gives a request a free row; None if the drafter fails, which ends the request."""
        request.row = row = self._rows.index(None)
        self._rows[row] = request
        try:
            self._drafting.join(row, request.encoded.tokens, draft=request.encoded.draft)
            self._drafting.constrain(row, request.grammar)
        except Exception as error:
            _log.exception("request %d could not begin", request.id)
            self._finish(request, events, error)
            return None
        return row

    def _report_pause(self) -> None:
        if self._paused_s and self.on_pause is not None:
            self.on_pause(self._paused_s)
        self._paused_s = 0.0

    def _deliver(self, events: list[Event]) -> None:
        """Hands out what the running rows have emitted, and frees those that have ended."""
        tokens, count, done, steps, finite = self._batch.look()
        for row, request in enumerate(self._rows):
            if request is None:
                continue
            request.steps = int(steps[row])
            try:
                if count[row] > len(request.output.tokens):
                    request.take(tokens[row, : count[row]], self._logprobs(request, row))
            except Exception as error:
                _log.exception("request %d ends here", request.id)
                self._finish(request, events, error)
                continue
            if not finite[row]:
                self._finish(request, events, self._non_finite(request))
            elif done[row] or request.output.stopped:
                self._warn_of_crossing(request)
                self._finish(request, events)
            elif (event := request.news()).tokens:
                events.append(event)
                self._tell(request, event, events)

    def _logprobs(self, request: ActiveRequest, row: int) -> Logprobs | None:
        """Those of a row's tokens; fetched from the device only if the request asks for them."""
        return None if request.encoded.logprobs is None else self._batch.logprobs(row)

    def _non_finite(self, request: ActiveRequest) -> NonFiniteError:
        """Why a request ends whose logits are NaN or infinite."""
        text = [*request.encoded.tokens, *request.output.tokens]
        return non_finite_error(
            self._model.params, text, f"request {request.id}", config=self._model.config
        )

    def _warn_of_crossing(self, request: ActiveRequest) -> None:
        """Warns if a request has outgrown the RoPE factors of its prompt."""
        known = len(request.encoded.tokens)
        total = known + len(request.output.tokens) - 1
        warn_of_crossing([known], [total], config=self._model.config)

    def _tell(self, request: ActiveRequest, event: Event, events: list[Event]) -> None:
        """Calls the request's callback; if it fails, the request ends."""
        if request.on_event is None:
            return
        try:
            request.on_event(event)
        except Exception as error:
            _log.exception("the callback of request %d failed", request.id)
            if event.result is None:
                self._finish(request, events, error)

    def _finish(
        self,
        request: ActiveRequest,
        events: list[Event],
        why: Literal["cancelled"] | BaseException | None = None,
    ) -> None:
        """Frees the row of a request, if it has one, and says how it ended."""
        if self._opening is not None and request in self._opening.requests:
            self._opening.drop(request)
            if not self._opening.requests:
                self._opening = None
        if (row := request.row) is not None:
            self._rows[row] = None
            self._batch.halt(row)
            try:
                self._drafting.leave(row, request.output.tokens)
            except Exception:
                _log.exception("the drafter failed to let go of request %d", request.id)
        event = request.end(why)
        self._queue.remove(request.id)
        events.append(event)
        self._tell(request, event, events)
