"""The form of a drafter that lives on the device, fused into the decoding step.

A device drafter is a frozen dataclass, a static argument of the jitted step, whose methods are
pure functions: what it learns is a state that travels with the batch, what it reads and never
changes (a draft model's weights) is handed in beside it. Rows of the batch join with `begin` and
need no farewell. B batch, P nodes, T prompt tokens, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from lookahead_jax.decoding.sampling import SamplingRows
from lookahead_jax.decoding.tree import Accepted, Layout, TokenTree, root_only
from lookahead_jax.model.config import ModelConfig

State = Any  # a drafter's own pytree
Weights = Any  # arrays a drafter only reads


class Verified(NamedTuple):
    """What the target said about a tree."""

    tree: TokenTree
    layout: Layout
    logits: jax.Array  # [B, P, V] float32, unprocessed; a row that is not valid means nothing
    accepted: Accepted


@runtime_checkable
class DeviceDrafter(Protocol):
    """Proposes trees inside the compiled step.

    Between two steps a drafter has been told every token of a row but its root, the last one
    emitted: prompts by `begin`, the others by `propose` (the root) and `update` (what was emitted
    since, but for the new root).
    """

    @property
    def weights(self) -> Weights: ...

    def init(self, batch: int, room: int, config: ModelConfig) -> State:
        """The state of `batch` empty rows of at most `room` tokens, prompt and output."""
        ...

    def begin(self, weights: Weights, state: State, rows: jax.Array, prompts: jax.Array) -> State:
        """Rows [n] int32 of the batch start anew with `prompts` [n, T] int32, padded with -1."""
        ...

    def propose(
        self, weights: Weights, state: State, root: jax.Array, nodes: int
    ) -> tuple[State, TokenTree]:
        """A tree of `nodes` nodes that continues each row's `root` [B], the best nodes first."""
        ...

    def update(self, weights: Weights, state: State, verified: Verified) -> State:
        """Learns from a step; rows whose root is not valid took no part."""
        ...


@runtime_checkable
class DrawingDrafter(DeviceDrafter, Protocol):
    """Draws its trees, and says from what: they are accepted by their probability."""

    def draw(
        self,
        weights: Weights,
        state: State,
        root: jax.Array,
        nodes: int,
        positions: jax.Array,
        rows: SamplingRows,
    ) -> tuple[State, TokenTree, jax.Array]:
        """Like `propose`, for `nodes` > 1; roots stand at `positions` [B] int32.

        Also returns the float32 probabilities [B, P, V] that the children of each node were drawn
        from, without replacement and in the order of their indices. Whether a node exists may
        depend on what was drawn before it, never on its own token.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoDrafter:
    """Plain decoding: a tree of one node."""

    weights = None

    def init(self, batch: int, room: int, config: ModelConfig) -> State:
        return ()

    def begin(self, weights: Weights, state: State, rows: jax.Array, prompts: jax.Array) -> State:
        return state

    def propose(
        self, weights: Weights, state: State, root: jax.Array, nodes: int
    ) -> tuple[State, TokenTree]:
        return state, root_only(root)

    def update(self, weights: Weights, state: State, verified: Verified) -> State:
        return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(NoDrafter):
    """Trees that the host has made: the state is those of the next step, from `host.pack`."""

    def propose(
        self, weights: Weights, state: jax.Array, root: jax.Array, nodes: int
    ) -> tuple[State, TokenTree]:
        tokens, parents = state
        return state, TokenTree(tokens.at[:, 0].set(root), parents)
