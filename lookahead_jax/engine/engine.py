"""Continuous batching: one model, a fixed number of rows, a queue of requests.

A waiting request is read alone (its prompt padded to a bucket, its cache cut to the budget), then
takes a free row of the batch while the others stay where they are; all rows decode together in
bursts, and a row that has finished is free for the next request. No request compiles anything
that its prompt's bucket has not compiled before, and none depends on its neighbours: the tokens
are those of `generate` for the same prompt, settings and seed.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.drafted import Drafting, RowError
from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.engine.batch import RunningBatch
from lookahead_jax.engine.prompt_reader import PromptReader
from lookahead_jax.engine.prompt_store import PromptStore
from lookahead_jax.engine.requests import Event, Job, Limits, Request, Result
from lookahead_jax.generation.inputs import announce, end_ids
from lookahead_jax.model.growth import warn_of_crossing
from lookahead_jax.model.sharding import mesh_in_use
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.prefilling.diagnosis import NonFiniteError, non_finite_error

_log = logging.getLogger(__name__)


class Engine:
    """A queue of requests and the rows that work on it.

    `submit`, `cancel`, `wait` and the counts may be called from any thread; `step`, `run` and
    `warm_up` from one at a time. A request's callback runs in the thread that calls `step`.

    Args:
      rows: requests that decode at the same time.
      budget: entries kept per layer and KV head of every prompt.
      max_new_tokens: the most a request may ask for.
      max_prompt_tokens: the longest prompt; None: what the model's positions leave. Policies that
        keep more than the budget need room for it.
      max_question_tokens: the longest prompt behind a document; every row has room for it. 0: no
        documents. Not together with evict_every, which would have to score the question too.
      eos_ids: end a row unless its request names others (None: the checkpoint's).
      drafter, draft_nodes, evict_every: as for `generate`; a host drafter learns from all
        requests.
      burst: steps between two looks of the host: a cancelled or finished row is free, and a
        waiting request begins, after at most as many.
      prompt_store_bytes: of read prompts to keep: an equal prompt is not read again, and goes on
        from the same numbers. The least recently used make room. 0 keeps none.

    Raises ValueError for sizes below 1 and settings that exclude each other.
    """

    def __init__(
        self,
        model: Model,
        *,
        policy: Policy,
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
        burst: int = 16,
        prompt_store_bytes: int = 0,
    ):
        if max_prompt_tokens is None:
            max_prompt_tokens = model.config.max_position - max_new_tokens - max_question_tokens
        sizes = dict(
            rows=rows, max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens, burst=burst,
        )  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if max_question_tokens < 0:
            raise ValueError(f"max_question_tokens must be at least 0, not {max_question_tokens}")
        self.limits = Limits(
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            max_question_tokens=max_question_tokens,
        )
        announce(policy, budget, self.limits.longest + max_new_tokens, model.config)
        self._model = model
        self._eos_ids = end_ids(model, eos_ids)
        eviction = None
        if evict_every is not None and max_question_tokens:
            raise ValueError("documents (max_question_tokens) and evict_every exclude each other")
        if evict_every is not None:
            eviction = DecodeEviction(policy=policy, budget=budget, interval=evict_every)
        self._drafting = Drafting(
            make_drafter(drafter) if isinstance(drafter, str) else drafter,
            draft_nodes,
            config=model.config,
            batch=rows,
            room=bucket_length(self.limits.longest) + max_new_tokens,
            eviction=eviction,
            modules=lookahead,
        )
        self._store = PromptStore(prompt_store_bytes)
        self._reader = PromptReader(
            model, self.limits, self._store, policy=policy, budget=budget, modules=lookahead,
            eviction=eviction,
        )  # fmt: skip
        self._batch = RunningBatch(
            model, self._drafting, rows=rows, slots=self._reader.slots, new_tokens=max_new_tokens,
            summed=eviction is not None and eviction.adds_up, burst=burst,
        )  # fmt: skip
        self._rows: list[Job | None] = [None] * rows
        self._ids = itertools.count()
        # Shared between threads, each access under the lock.
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._alive: dict[int, Job] = {}
        self._cancelled: set[int] = set()

    @property
    def rows(self) -> int:
        """Requests that may decode at the same time."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        with self._changed:
            return len(self._waiting)

    @property
    def alive(self) -> int:
        """Requests that have not ended, those that wait included."""
        with self._changed:
            return len(self._alive)

    @property
    def stored_bytes(self) -> int:
        """Bytes of read prompts that are kept at the moment."""
        return self._store.bytes

    def submit(self, request: Request) -> int:
        """Queues a request; the number by which events and `cancel` know it.

        Raises ValueError, naming the limit, for what this engine cannot serve.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[int]:
        """Queues requests next to each other, or, with `submit`'s ValueError, none of them."""
        jobs = [
            Job(next(self._ids), request, self._model, self.limits, self._eos_ids)
            for request in requests
        ]
        with self._changed:
            self._alive.update((job.id, job) for job in jobs)
            self._waiting.extend(jobs)
            self._changed.notify_all()
        return [job.id for job in jobs]

    def cancel(self, request: int) -> bool:
        """Ends a request within a burst; False if it has ended already, or never was."""
        with self._changed:
            if request not in self._alive:
                return False
            self._cancelled.add(request)
            self._changed.notify_all()
            return True

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until there is something to do for `step`; False if nothing came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._alive), timeout)

    def step(self) -> list[Event]:
        """Cancels, fills free rows, runs a burst; what came of it, in the order it came.

        An error while a request is read, or a drafter's while it drafts for it, ends that
        request; one of the model's steps ends all that take part. The events say so, and the
        engine goes on.
        """
        events: list[Event] = []
        self._cancel(events)
        with mesh_in_use(self._model.params):
            self._serve(events)
        return events

    def _serve(self, events: list[Event]) -> None:
        try:
            self._admit(events)
            if any(self._rows):
                self._batch.advance()
                self._deliver(events)
        except RowError as failed:
            if (job := self._rows[failed.row]) is not None:
                self._finish(job, events, failed.error)
        except Exception as error:  # whatever failed, nobody may be left waiting
            _log.exception("decoding failed; its requests end here")
            for job in [job for job in self._rows if job is not None]:
                self._finish(job, events, error)
            self._batch.clear()

    def run(self, requests: Sequence[Request] = ()) -> list[Result]:
        """Serves `requests` and all that wait; the results, in the order of submission."""
        self.submit_all(requests)
        results = []
        while self.alive:
            results += [event.result for event in self.step() if event.result is not None]
        return sorted(results, key=lambda result: result.id)

    def warm_up(self, lengths: Iterable[int] | None = None) -> None:
        """Compiles what prompts of `lengths` tokens need (None: of every length allowed).

        Raises ValueError while a request runs.
        """
        if any(self._rows):
            raise ValueError("warm up before the first request, not while one runs")
        lengths = range(1, self.limits.max_prompt_tokens + 1) if lengths is None else lengths
        with mesh_in_use(self._model.params):
            self._batch.warm_up(self._reader.samples(lengths))

    def _admit(self, events: list[Event]) -> None:
        """Waiting requests take the free rows, first come, first served."""
        for row in range(len(self._rows)):
            while self._rows[row] is None and (job := self._next()) is not None:
                job.start()
                request = job.request
                try:
                    opening, job.reused_tokens = self._reader.read(
                        job.tokens, request.max_new_tokens, request.sampling, request.seed,
                        job.eos_ids, document=job.document,
                    )  # fmt: skip
                    self._drafting.join(row, job.tokens)
                except Exception as error:
                    _log.exception("request %d could not begin", job.id)
                    self._finish(job, events, error)
                    continue
                self._rows[row], job.row = job, row
                self._batch.insert(row, opening)
                self._deliver(events)  # the first token waits neither for others nor for a burst

    def _next(self) -> Job | None:
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def _deliver(self, events: list[Event]) -> None:
        """Hands out what the running rows have emitted, and frees those that have ended."""
        tokens, count, done, steps, finite = self._batch.look()
        for row, job in enumerate(self._rows):
            if job is None:
                continue
            job.steps = int(steps[row])
            job.output.feed(tokens[row, len(job.output.tokens) : count[row]].tolist())
            if not finite[row]:
                self._finish(job, events, self._non_finite(job))
            elif done[row] or job.output.stopped:
                self._warn_of_crossing(job)
                self._finish(job, events)
            elif (event := job.news()).tokens:
                events.append(event)
                self._tell(job, event, events)

    def _non_finite(self, job: Job) -> NonFiniteError:
        """Why a request ends whose logits are NaN or infinite."""
        text = [*job.tokens, *job.output.tokens]
        return non_finite_error(
            self._model.params, text, f"request {job.id}", config=self._model.config
        )

    def _warn_of_crossing(self, job: Job) -> None:
        """Warns if a request has outgrown the RoPE factors of its prompt."""
        known = len(job.tokens)
        total = known + len(job.output.tokens) - 1
        warn_of_crossing([known], [total], config=self._model.config)

    def _tell(self, job: Job, event: Event, events: list[Event]) -> None:
        """Calls the request's callback; one that fails has nobody listening any more."""
        if job.request.on_event is None:
            return
        try:
            job.request.on_event(event)
        except Exception as error:
            _log.exception("the callback of request %d failed", job.id)
            if event.result is None:
                self._finish(job, events, error)

    def _finish(
        self,
        job: Job,
        events: list[Event],
        why: Literal["cancelled"] | Exception | None = None,
    ) -> None:
        """Frees the row of a request, if it has one, and says how it ended."""
        if (row := job.row) is not None:
            self._rows[row] = None
            self._batch.halt(row)
            try:
                self._drafting.leave(row, job.output.tokens)
            except Exception:
                _log.exception("the drafter failed to let go of request %d", job.id)
        event = job.end(why)
        with self._changed:
            self._alive.pop(job.id, None)
            self._cancelled.discard(job.id)
        events.append(event)
        self._tell(job, event, events)

    def _cancel(self, events: list[Event]) -> None:
        with self._changed:
            jobs = [self._alive[id] for id in sorted(self._cancelled)]
            for job in jobs:
                if job in self._waiting:
                    self._waiting.remove(job)
        for job in jobs:
            self._finish(job, events, "cancelled")
