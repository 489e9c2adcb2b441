"""Decoding with a drafter, on the host: asks for drafts, chooses their size, runs the steps."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lookahead_jax.decoding.constraints import Constraints
from lookahead_jax.decoding.device_drafter import (
    DeviceDrafter,
    DrawingDrafter,
    Given,
    NoDrafter,
    Weights,
    readable,
)
from lookahead_jax.decoding.draft_estimates import TUNING
from lookahead_jax.decoding.draft_packing import pack, unpack
from lookahead_jax.decoding.draft_programs import attach, check_devices, draft_trees
from lookahead_jax.decoding.draft_report import DraftReport, draft_report
from lookahead_jax.decoding.draft_watching import Watched, WatchedRows, judge
from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.decoding.grammar import GrammarRow
from lookahead_jax.decoding.host_drafter import Draft, HostDrafter
from lookahead_jax.decoding.host_requests import HostRequests
from lookahead_jax.decoding.node_budget import RowChances, needed
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.placement import placed
from lookahead_jax.decoding.row_error import RowError
from lookahead_jax.decoding.state import DecodeState
from lookahead_jax.decoding.step import PLAIN, Step, decode_burst, decode_step
from lookahead_jax.decoding.tree import NODE_BUCKETS
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import Program
from lookahead_jax.model.params import Params
from lookahead_jax.modules.definition import LookaheadModules

_log = logging.getLogger(__name__)


class Drafting:
    """Decoding steps of a batch, with a host drafter or a device drafter.

    All rows join with `begin` and leave with `end`, single rows with `join` and `leave`; `advance`
    runs the model. `nodes` is the number of nodes per step and row, or the controller that chooses
    it (None: a new one); rows then share their nodes (node_budget.py). `room` is the most tokens of
    a row, prompt included.

    Raises ValueError for a number of nodes that this drafter cannot have.
    """

    def __init__(
        self,
        drafter: HostDrafter | DeviceDrafter,
        nodes: int | Controller | None,
        *,
        config: ModelConfig,
        batch: int,
        room: int,
        eviction: DecodeEviction | None = None,
        modules: LookaheadModules | None = None,
        on_step: Callable[[Step], Any] | None = None,
    ):
        plain = type(drafter) is NoDrafter  # others may build on it
        if nodes is not None and not isinstance(nodes, Controller):
            check_integer("draft_nodes", nodes)
            nodes = int(nodes)
        elif plain:
            nodes = 1
        if isinstance(nodes, int) and (nodes not in NODE_BUCKETS or (plain and nodes > 1)):
            possible = "1" if plain else ", ".join(map(str, NODE_BUCKETS))
            raise ValueError(f"draft_nodes must be {possible} with this drafter, not {nodes}")
        self._nodes = Controller() if nodes is None else nodes
        self._own = nodes is None  # a controller that ends with this object
        self._config = config
        self._room = room
        self._eviction = eviction
        # Programs are compiled for their arguments: modules that are not read are not passed.
        self._modules = modules if eviction is not None and eviction.reads_modules else None
        self._on_step = on_step
        self._host = None if isinstance(drafter, DeviceDrafter) else HostRequests(drafter, batch)
        self._device = drafter if isinstance(drafter, DeviceDrafter) else Given()
        self._constraints = Constraints(batch, config.vocab_size)
        self._batch = batch
        self._drafted, self._undrafted = set[int](), set[int]()  # rows that have joined
        self._chances = RowChances(batch)
        self._watched_rows: WatchedRows | None = None
        if self._host is not None and isinstance(self._nodes, Controller) and on_step is None:
            self._watched_rows = WatchedRows(self._host, self._nodes, self._chances, batch)
        self.compile_s = 0.0  # spent on compiling so far

    def begin(
        self, state: DecodeState, prompts: Sequence[Sequence[int]], tokens: jax.Array
    ) -> DecodeState:
        """All rows join with their prompts, also given as an array [B, T] padded with -1.

        A device drafter can begin again with other texts, and keeps what it knows beside them.
        Raises ValueError for a draft model on other devices than the target.
        """
        if self._host is None:
            check_devices(self._device.weights, state)
            return self._call(
                attach, state, self._device.weights, tokens,
                drafter=self._device, room=self._room, config=self._config,
            )  # fmt: skip
        try:
            for row, prompt in enumerate(prompts):
                self.join(row, prompt)
        except BaseException:
            self.abandon()
            raise
        return state

    @property
    def device(self) -> DeviceDrafter:
        """The device drafter; `NoDrafter` if the host drafts."""
        return self._device if self._host is None else NoDrafter()

    def empty(self) -> Any:
        """The state of `device` for a batch in which no row has begun."""
        return self.device.init(self._batch, self._room, self._config)

    def join(
        self, row: int, prompt: Sequence[int], *, draft: bool = True, emitted: int = 0
    ) -> None:
        """One row joins a host drafter; a device drafter begins it in the batch's program.

        Without `draft` it is decoded plainly: `DecodeState.drafted` has to say so, too. The last
        `emitted` tokens of `prompt` are those that the row has emitted already.
        """
        (self._drafted if draft else self._undrafted).add(row)
        self._chances.begin(row)
        if self._host is not None and draft:
            self._host.join(row, prompt, emitted)
            if self._watched_rows is not None:
                self._watched_rows.join(row, emitted)

    def constrain(self, row: int, grammar: GrammarRow | None) -> None:
        """A row that has no output yet follows a grammar until it leaves; None: it does not."""
        self._constraints.put(row, grammar)

    def leave(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
        """One row leaves after emitting `tokens`; does nothing for a row that has not joined."""
        self._watch_ends({row: np.asarray(tokens, np.int32)})
        self._leave(row, tokens)

    def _watch_ends(self, texts: Mapping[int, np.ndarray]) -> None:
        """Watches along the last tokens of rows that have ended; a failure costs no answer."""
        if self._watched_rows is not None:
            rows = len(self._drafted | self._undrafted)
            try:
                self._watched_rows.watch_ends(texts, self._sharing, max(rows, len(texts)))
            except RowError:
                _log.exception("the drafter failed behind the end of an answer")

    def _leave(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
        self._constraints.put(row, None)
        self._drafted.discard(row)
        self._undrafted.discard(row)
        if self._host is not None:
            self._host.leave(row, tokens)

    def advance(self, params: Params, state: DecodeState, burst: int) -> DecodeState:
        """Runs up to `burst` steps, or one if the host drafts for it. The state is donated.

        While a row follows a grammar there is one step at a time, since the host makes its masks,
        and drafters that draw their trees do not draft. Raises RowError, before any row has made a
        step, where the drafter or the grammar of one row fails.
        """
        constrained = self._constraints.follow(state)
        if constrained:
            burst = 1
            if self._draws:
                return self._run(params, state, 1, 1, None, constrained=True)
        if self._undrafted and not self._drafted:
            return self._run(params, state, 1, burst, None, constrained=constrained)
        if isinstance(self._nodes, int):
            drafts = self._drafts(state, self._nodes)
            return self._run(params, state, self._nodes, burst, drafts, constrained=constrained)
        controller = self._nodes
        if self._watched_rows is not None:
            self._watched_rows.watch_running(state, burst, self._sharing)
        # Drawn trees cannot be judged without a run.
        watchable = not self._draws and self._on_step is None
        behind = self._watched_rows is not None
        plan = controller.choose(burst, watchable=watchable, behind=behind)
        watched = self._watch(params, state, plan.watch) if plan.watch else None
        known = jax.device_get((state.reached, state.count, state.places))
        before, count, places = map(np.array, known)  # copies: the state is donated
        compiled = self.compile_s
        begin = time.perf_counter()
        drafts = self._drafts(state, plan.most)
        nodes, cut = plan.most, True
        if drafts:
            running = [
                d for d, done in zip(drafts, np.asarray(state.done), strict=True) if not done
            ]
            nodes, cut = needed(running, plan.most, controller.buckets, self._sharing)
        steps = 1 if drafts else plan.steps
        state = self._run(params, state, nodes, steps, drafts, constrained=constrained)
        reached, after = jax.device_get((state.reached, state.places))  # waits for the device
        reached = reached - before
        seconds = time.perf_counter() - begin
        if (ran := int(reached[:, 0].max())) == 0:
            return state
        reached[list(self._undrafted)] = 0  # what drafts gain is not seen in rows without
        gains = {}
        if plan.most > 1:
            if self._watched_rows is not None:
                self._watched_rows.drafted(np.asarray(state.count).tolist())
            if not reached.any():
                return state
            gains = self._gains(reached, plan.most, cut)
        self._chances.learn(after - places, ran)
        measured = self.compile_s == compiled
        controller.record(plan.most, nodes, gains, ran, seconds / ran if measured else None)
        if watched is not None:
            ends = np.array(state.count)
            ends[list(self._undrafted)] = 0
            texts = [
                row[a:b] for row, a, b in zip(np.asarray(state.tokens), count, ends, strict=True)
            ]
            judge(watched, texts, controller, self._chances, self._sharing)
        return state

    @property
    def _draws(self) -> bool:
        return isinstance(self._device, DrawingDrafter)

    @property
    def _sharing(self) -> int:
        """Rows that share a budget; 1 over several devices, where it would cost transfers."""
        shares = isinstance(self._nodes, Controller) and not self._draws
        return self._batch if shares and jax.sharding.get_abstract_mesh().empty else 1

    def _gains(self, reached: np.ndarray, most: int, cut: bool) -> dict[int, float]:
        """Nodes -> tokens per step and row of steps of that size, from accepted nodes [B, 6].

        `cut` says that larger trees than `most` might have had more nodes.
        """
        means = (reached.sum(0) / reached[:, 0].sum()).tolist()
        gains: dict[int, float] = dict(zip(NODE_BUCKETS, means, strict=True))
        if self._draws:  # the first nodes of a drawn tree are not drawn as a smaller tree's
            return {most: gains[most]}
        if cut:
            return {n: gain for n, gain in gains.items() if n <= most}
        return gains

    def _readable(self, params: Params, state: DecodeState) -> Weights:
        """What the device drafter reads to propose trees."""
        return readable(self._device, self._device.weights, params, state.cache, self._config)

    def _watch(self, params: Params, state: DecodeState, nodes: int) -> Watched:
        """The device drafter's drafts for every row, which will not be run."""
        begin, compiled = time.perf_counter(), self.compile_s
        tree = self._call(
            draft_trees, self._readable(params, state), state.draft, state.token,
            drafter=self._device, nodes=nodes,
        )  # fmt: skip
        drafts = unpack(np.asarray(tree.tokens), np.asarray(tree.parents))
        seconds = time.perf_counter() - begin + TUNING.interruption_s
        return Watched(drafts, nodes, seconds if self.compile_s == compiled else None)

    def _run(
        self,
        params: Params,
        state: DecodeState,
        nodes: int,
        burst: int,
        drafts: Sequence[Draft] | None,
        *,
        constrained: bool = False,
    ) -> DecodeState:
        step, options, drafter = self._program(nodes, burst, constrained)
        if self._sharing > 1 and nodes > 1:
            options["worth"] = self._chances.worth(nodes)
        if self._host is not None:
            draft = pack(drafts, nodes) if drafts and nodes > 1 else ()
            state = dataclasses.replace(state, draft=draft)
        if constrained:
            by_device = None if self._host is not None or nodes == 1 else drafter
            state, masked = self._constraints.prepare(
                state, by_device, self._readable(params, state), nodes, call=self._call
            )
            options.update(masked)
        result = self._call(step, params, state, drafter.weights, self._modules, **options)
        if isinstance(result, DecodeState):
            return placed(result, params)
        if self._on_step is not None:
            self._on_step(jax.tree.map(np.asarray, result[1]))
        return placed(result[0], params)

    def _call(self, f: Program, *arguments: Any, **options: Any) -> Any:
        """Calls a program; the time counts as `compile_s` if the call compiled it."""
        known, begin = f.compiled(), time.perf_counter()
        result = f(*arguments, **options)
        if f.compiled() > known:
            self.compile_s += time.perf_counter() - begin
        return result

    def warm_up(
        self, params: Params, state: DecodeState, burst: int, *, grammars: bool = False
    ) -> DecodeState:
        """Compiles every step that `advance` may take. All rows of `state` must be done.

        `grammars`: also those for rows with grammars.
        """
        buckets = (self._nodes,) if isinstance(self._nodes, int) else self._nodes.buckets
        buckets = sorted({1, *buckets})  # rows may do without drafts
        for nodes in buckets:
            state = self._run(params, state, nodes, burst, self._drafts(state, nodes))
        for nodes in ((1,) if self._draws else buckets) if grammars else ():
            drafts = self._drafts(state, nodes)
            state = self._run(params, state, nodes, 1, drafts, constrained=True)
        if self._host is None and isinstance(self._nodes, Controller) and self._nodes.watch > 1:
            self._watch(params, state, self._nodes.watch)
        return state

    def end(self, state: DecodeState) -> None:
        """All rows leave."""
        if self._host is None:
            return
        tokens, counts = np.asarray(state.tokens), np.asarray(state.count)
        texts = {row: tokens[row, :count] for row, count in enumerate(counts.tolist())}
        if not self._own:  # nobody will ask a controller of our own again
            self._watch_ends(texts)
        for row, text in texts.items():
            self._leave(row, text)

    def abandon(self) -> None:
        """All rows leave after a failure, so that the drafter can be used again."""
        for row in range(self._batch):
            self._leave(row, ())

    def report(self, state: DecodeState) -> DraftReport:
        """The report on the rows in `state` so far."""
        host = self._host
        seconds, proposals = (0.0, 0) if host is None else (host.seconds, host.proposals)
        return draft_report(np.asarray(state.lengths), seconds, proposals)

    def _program(
        self, nodes: int, burst: int, constrained: bool
    ) -> tuple[Any, dict[str, Any], DeviceDrafter]:
        """The program for steps of `nodes` nodes, its options, and its drafter."""
        asks_host = self._host is not None and nodes > 1
        drafter = self._device if self._host is None or asks_host else PLAIN
        options = dict(config=self._config, drafter=drafter, nodes=nodes, eviction=self._eviction)
        if asks_host or constrained or self._on_step is not None:
            return decode_step, options, drafter
        return decode_burst, {**options, "steps": burst}, drafter

    def _drafts(self, state: DecodeState, nodes: int) -> list[Draft] | None:
        """The host drafter's draft for every running row; None if it is not asked."""
        if self._host is None or nodes == 1:
            return None
        tokens, counts, limits, done = (
            np.asarray(a) for a in (state.tokens, state.count, state.limit, state.done)
        )
        running = {row: int(counts[row]) for row in np.flatnonzero(~done).tolist()}
        return self._host.propose(running, tokens, limits, nodes)[0]
