"""Decoding with a drafter, seen from the host: who proposes, how many nodes, what came of it."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.device_drafter import DeviceDrafter, DrawingDrafter, Given, NoDrafter
from lookahead_jax.decoding.draft_packing import NOTHING, pack, path_of, unpack
from lookahead_jax.decoding.eviction import DecodeEviction
from lookahead_jax.decoding.host_drafter import Draft, HostDrafter
from lookahead_jax.decoding.node_choice import Controller
from lookahead_jax.decoding.step import PLAIN, DecodeState, Step, decode_burst, decode_step
from lookahead_jax.decoding.tree import NODE_BUCKETS, TokenTree
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import Program, program
from lookahead_jax.model.layers import Params
from lookahead_jax.modules.definition import LookaheadModules

_request = itertools.count()  # numbers requests of this process, whichever drafter they use


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftReport:
    """What drafting came to, all rows together."""

    steps: int  # target forwards, counted once for every row that took part
    mean_accepted: float | None  # tokens emitted per target forward; None if there was none
    drafter_us: float | None  # microseconds of a host drafter per draft; None: it made none
    histogram: list[int]  # entry i: forwards that emitted i + 1 tokens


class _Watched(NamedTuple):
    """Drafts that are compared with what is emitted, and not run."""

    drafts: Sequence[Draft]  # of every row
    nodes: int
    seconds: float | None  # that they took; None: compiled meanwhile


class RowError(Exception):
    """The host drafter failed at one row; no row has made a step."""

    def __init__(self, row: int, error: Exception):
        super().__init__(f"row {row}: {type(error).__name__}: {error}")
        self.row = row
        self.error = error


class Drafting:
    """Steps of a batch with a drafter of either form.

    A row of the batch joins with `begin` and leaves with `end`; `advance` runs the model. `nodes`
    is the number of nodes of every step, or who chooses it (None: someone new).
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
        if plain and not isinstance(nodes, int):
            nodes = 1
        if isinstance(nodes, int) and (nodes not in NODE_BUCKETS or (plain and nodes > 1)):
            possible = "1" if plain else ", ".join(map(str, NODE_BUCKETS))
            raise ValueError(f"a step with this drafter has {possible} nodes, not {nodes}")
        self._nodes = Controller() if nodes is None else nodes
        self._config = config
        self._room = room
        self._eviction = eviction
        # A program is compiled for what it is given: modules that nobody reads stay away.
        self._modules = modules if eviction is not None and eviction.reads_modules else None
        self._on_step = on_step
        self._host = None if isinstance(drafter, DeviceDrafter) else drafter
        self._device = drafter if isinstance(drafter, DeviceDrafter) else Given()
        self._requests: list[int | None] = [None] * batch
        self._observed = [0] * batch
        self.compile_s = 0.0  # spent on compiling so far
        self._drafting_s = 0.0
        self._steps = 0

    def begin(
        self, state: DecodeState, prompts: Sequence[Sequence[int]], tokens: jax.Array
    ) -> DecodeState:
        """All rows join with their prompts, also given as an array [B, T] padded with -1.

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
        """Where single rows begin on the device; the plain one if the host drafts."""
        return self._device if self._host is None else NoDrafter()

    def empty(self) -> Any:
        """The state of `device` for a batch in which no row has begun."""
        return self.device.init(len(self._requests), self._room, self._config)

    def join(self, row: int, prompt: Sequence[int]) -> None:
        """One row begins, as far as the host is concerned."""
        if self._host is not None:
            request = next(_request)
            self._host.begin(request, prompt)
            self._requests[row], self._observed[row] = request, 0

    def leave(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
        """One row leaves after it has emitted `tokens`; nothing happens if it had not joined."""
        request = self._requests[row]
        if self._host is not None and request is not None:
            try:
                self._observe(row, np.asarray(tokens, np.int32), len(tokens))
            finally:
                self._requests[row] = None
                self._host.end(request)

    def advance(self, params: Params, state: DecodeState, burst: int) -> DecodeState:
        """Runs up to `burst` steps; one, if the host takes part in it. The state is donated."""
        if isinstance(self._nodes, int):
            return self._run(params, state, self._nodes, burst, self._drafts(state, self._nodes))
        controller = self._nodes
        drawn = isinstance(self._device, DrawingDrafter)  # its trees mean nothing unless they run
        plan = controller.choose(burst, watchable=not drawn and self._on_step is None)
        watched = self._watch(state, plan.watch) if plan.watch else None
        before, count, compiled = np.array(state.reached), np.array(state.count), self.compile_s
        begin = time.perf_counter()
        drafts = self._drafts(state, plan.most)
        longest = max((len(draft.tokens) for draft in drafts or ()), default=plan.most)
        nodes = controller.holding(min(longest + 1, plan.most))
        state = self._run(params, state, nodes, 1 if drafts else plan.steps, drafts)
        reached = np.asarray(state.reached) - before  # waits for the device
        seconds = time.perf_counter() - begin
        if (ran := int(reached[:, 0].max())) == 0:
            return state
        gains: dict[int, float] = {}
        if plan.most > 1:
            means = (reached.sum(0) / reached[:, 0].sum()).tolist()
            gains = dict(zip(NODE_BUCKETS, means, strict=True))
        if drawn and plan.most > 1:
            gains = {plan.most: gains[plan.most]}  # a drawn tree's first nodes are not drawn so
        elif longest + 1 >= plan.most:  # more might have been drafted
            gains = {n: gain for n, gain in gains.items() if n <= plan.most}
        measured = self.compile_s == compiled
        controller.record(plan.most, nodes, gains, ran, seconds / ran if measured else None)
        if watched is not None:
            texts = [
                row[a:b]
                for row, a, b in zip(
                    np.asarray(state.tokens), count, np.asarray(state.count), strict=True
                )
            ]
            self._judge(controller, watched, texts)
        return state

    def _watch(self, state: DecodeState, nodes: int) -> _Watched:
        """Drafts for every row that will not run."""
        begin, compiled = time.perf_counter(), self.compile_s
        drafts = self._drafts(state, nodes)
        if drafts is None:
            tree = self._call(
                propose, self._device.weights, state.draft, state.token,
                drafter=self._device, nodes=nodes,
            )  # fmt: skip
            drafts = unpack(np.asarray(tree.tokens), np.asarray(tree.parents))
        seconds = time.perf_counter() - begin
        return _Watched(drafts, nodes, seconds if self.compile_s == compiled else None)

    def _judge(
        self, controller: Controller, watched: _Watched, texts: Sequence[np.ndarray]
    ) -> None:
        """Tells the controller what the drafts were worth, now that the texts have gone on."""
        went = [(d, text) for d, text in zip(watched.drafts, texts, strict=True) if text.size]
        paths = [path_of(draft, text[:-1].tolist()) for draft, text in went]
        longest = max(len(draft.tokens) for draft, _ in went)
        gains, sizes = {}, {}
        for n in controller.buckets:
            if n <= watched.nodes:
                gains[n] = 1 + sum(node + 1 < n for path in paths for node in path) / len(paths)
                sizes[n] = controller.holding(min(longest + 1, n))
        controller.record_watched(gains, sizes, watched.seconds)

    def _run(
        self,
        params: Params,
        state: DecodeState,
        nodes: int,
        burst: int,
        drafts: Sequence[Draft] | None,
    ) -> DecodeState:
        step, options, drafter = self._program(nodes, burst)
        if self._host is not None:
            draft = pack(drafts, nodes) if drafts and nodes > 1 else ()
            state = dataclasses.replace(state, draft=draft)
        result = self._call(step, params, state, drafter.weights, self._modules, **options)
        if isinstance(result, DecodeState):
            return result
        if self._on_step is not None:
            self._on_step(jax.tree.map(np.asarray, result[1]))
        return result[0]

    def _call(self, f: Program, *arguments: Any, **options: Any) -> Any:
        """Calls a program, and keeps the time apart if that compiled it."""
        known, begin = f.compiled(), time.perf_counter()
        result = f(*arguments, **options)
        if f.compiled() > known:
            self.compile_s += time.perf_counter() - begin
        return result

    def warm_up(self, params: Params, state: DecodeState, burst: int) -> DecodeState:
        """Compiles every step that `advance` may take. Nothing may run in `state`."""
        for nodes in (self._nodes,) if isinstance(self._nodes, int) else self._nodes.buckets:
            state = self._run(params, state, nodes, burst, self._drafts(state, nodes))
        if isinstance(self._nodes, Controller) and self._nodes.watch > 1:
            self._watch(state, self._nodes.watch)
        return state

    def end(self, state: DecodeState) -> None:
        """All rows leave."""
        if self._host is None:
            return
        tokens, counts = np.asarray(state.tokens), np.asarray(state.count)
        begin = time.perf_counter()
        for row, count in enumerate(counts.tolist()):
            self.leave(row, tokens[row, :count])
        self._drafting_s += time.perf_counter() - begin

    def abandon(self) -> None:
        """All rows leave, whatever they have emitted: a drafter outlives what has failed."""
        for row in range(len(self._requests)):
            self.leave(row, ())

    def report(self, state: DecodeState) -> DraftReport:
        """The steps of the rows in `state` so far."""
        lengths = np.asarray(state.lengths).sum(0)
        steps = int(lengths.sum())
        emitted = int(lengths @ np.arange(1, lengths.size + 1))
        return DraftReport(
            steps=steps,
            mean_accepted=emitted / steps if steps else None,
            drafter_us=self._drafting_s / self._steps * 1e6 if self._steps else None,
            histogram=np.trim_zeros(lengths, "b").tolist(),
        )

    def _program(self, nodes: int, burst: int) -> tuple[Any, dict[str, Any], DeviceDrafter]:
        """The function for steps of `nodes` nodes, its options, and its drafter."""
        asks_host = self._host is not None and nodes > 1
        drafter = self._device if self._host is None or asks_host else PLAIN
        options = dict(config=self._config, drafter=drafter, nodes=nodes, eviction=self._eviction)
        if asks_host or self._on_step is not None:
            return decode_step, options, drafter
        return decode_burst, {**options, "steps": burst}, drafter

    def _drafts(self, state: DecodeState, nodes: int) -> list[Draft] | None:
        """What the host drafter says about every row that is running; None if it is not asked."""
        host = self._host
        if host is None or nodes == 1:
            return None
        tokens, counts, limits, done = (
            np.asarray(a) for a in (state.tokens, state.count, state.limit, state.done)
        )
        begin = time.perf_counter()
        drafts = []
        for row, request in enumerate(self._requests):
            if request is None or done[row]:
                drafts.append(NOTHING)
                continue
            try:
                self._observe(row, tokens[row], int(counts[row]))
                depth = min(int(limits[row] - counts[row]), nodes) - 1
                draft = host.propose(request, nodes - 1, depth) if depth > 0 else NOTHING
            except Exception as error:
                raise RowError(row, error) from error
            drafts.append(draft)
        self._drafting_s += time.perf_counter() - begin
        self._steps += 1
        return drafts

    def _observe(self, row: int, tokens: np.ndarray, count: int) -> None:
        """Tells the host drafter what a row has emitted since it was last told."""
        request, new = self._requests[row], tokens[self._observed[row] : count]
        if self._host is not None and request is not None and new.size:
            self._host.observe(request, new.tolist())
        self._observed[row] = count


def check_devices(weights: Any, state: Any) -> None:
    """One program runs both models: what has been put on devices must be on the same ones.

    Raises ValueError where the arrays of a draft model and of the target are not.
    """
    drafts, target = (
        {
            device
            for leaf in jax.tree.leaves(part)
            if isinstance(leaf, jax.Array) and leaf.committed
            for device in leaf.sharding.device_set
        }
        for part in (weights, state)
    )
    if drafts and target and drafts != target:
        raise ValueError(
            f"the draft model is on {len(drafts)} of the devices and the target on {len(target)}: "
            "load the draft model with mesh= of the target"
        )


@program(static_argnames=("drafter", "room", "config"), donate_argnames=("state",))
def attach(
    state: DecodeState,
    weights: Any,
    prompts: jax.Array,
    *,
    drafter: DeviceDrafter,
    room: int,
    config: ModelConfig,
) -> DecodeState:
    """Decoding with a device drafter: its state, every row begun with its prompt [B, T]."""
    rows = jnp.arange(prompts.shape[0], dtype=jnp.int32)
    draft = drafter.begin(weights, drafter.init(len(rows), room, config), rows, prompts)
    return dataclasses.replace(state, draft=draft)


@program(static_argnames=("drafter", "nodes"))
def propose(
    weights: Any, state: Any, root: jax.Array, *, drafter: DeviceDrafter, nodes: int
) -> TokenTree:
    """The trees that a device drafter would have a step run."""
    return drafter.propose(weights, state, root, nodes)[1]
