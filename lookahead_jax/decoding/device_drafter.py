"""The interface of drafters that run on the device, compiled into the decoding step.

A device drafter is a frozen dataclass, a static argument of the jitted step. Its methods are pure
functions: what it learns is a state that travels with the batch, and what it only reads (a draft
model's weights) is a separate argument. Rows join with `begin` and do not have to leave. B batch,
P nodes, T prompt tokens, D model dim, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import struct

from lookahead_jax.decoding.sampling import SamplingRows
from lookahead_jax.decoding.tree import Accepted, Layout, TokenTree, root_only
from lookahead_jax.model.cache import KVCache
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params

State = Any  # the drafter's pytree
Weights = Any  # arrays a drafter only reads


class Verified(NamedTuple):
    """A tree after the target has verified it."""

    tree: TokenTree
    layout: Layout
    logits: jax.Array  # [B, P, V] float32, unprocessed; undefined for nodes that are not valid
    accepted: Accepted
    hidden: jax.Array  # [B, P, D] float, after the final norm
    exits: tuple[jax.Array, ...] = ()  # [B, P, D] each, likewise, for a `SelfDrafter`


@runtime_checkable
class DeviceDrafter(Protocol):
    """Proposes trees inside the compiled step.

    Between two steps a drafter knows every token of a row but the last emitted one, the next root:
    the prompt from `begin`, the others from `propose` (the root) and `update` (the emitted tokens
    except the new root).
    """

    @property
    def weights(self) -> Weights: ...

    def init(self, batch: int, room: int, config: ModelConfig) -> State:
        """The state of `batch` empty rows of at most `room` tokens, prompt and output."""
        ...

    def begin(self, weights: Weights, state: State, rows: jax.Array, prompts: jax.Array) -> State:
        """Rows [n] int32 of the batch begin with `prompts` [n, T] int32, padded with -1."""
        ...

    def propose(
        self, weights: Weights, state: State, root: jax.Array, nodes: int
    ) -> tuple[State, TokenTree]:
        """A tree of `nodes` nodes that continues each row's `root` [B], the best nodes first."""
        ...

    def update(self, weights: Weights, state: State, verified: Verified) -> State:
        """Learns from a step. Rows whose root is not valid took no part in it."""
        ...


@runtime_checkable
class DrawingDrafter(DeviceDrafter, Protocol):
    """Samples its trees, which are then accepted by their probability (acceptance.py)."""

    def draw(
        self,
        weights: Weights,
        state: State,
        root: jax.Array,
        nodes: int,
        *,
        positions: jax.Array,
        sampling: SamplingRows,
    ) -> tuple[State, TokenTree, jax.Array]:
        """Like `propose`, for `nodes` > 1; `positions` [B] int32 are those of the roots.

        Also returns the float32 probabilities [B, P, V] that the children of each node were drawn
        from, without replacement and in the order of their indices. Whether a node exists may
        depend on the nodes drawn before it, never on its own token.
        """
        ...


@struct.dataclass
class Target:
    """The model that verifies, as a `SelfDrafter` reads it."""

    params: Params
    cache: KVCache  # of all tokens but the root
    config: ModelConfig = struct.field(pytree_node=False)


@runtime_checkable
class SelfDrafter(DeviceDrafter, Protocol):
    """Drafts with the target itself: the weights of `propose` and `update` are a `Target`."""

    def exits(self, config: ModelConfig) -> tuple[int, ...]:
        """Numbers of layers after which `Verified.exits` has the hidden states."""
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


@dataclasses.dataclass(frozen=True)
class Proposed:
    """A drafter whose trees were proposed before the step: the state is (its state, the trees)."""

    drafter: DeviceDrafter

    @property
    def weights(self) -> Weights:
        return self.drafter.weights

    def init(self, batch: int, room: int, config: ModelConfig) -> State:
        raise NotImplementedError("rows begin with the drafter itself")

    def begin(self, weights: Weights, state: State, rows: jax.Array, prompts: jax.Array) -> State:
        raise NotImplementedError("rows begin with the drafter itself")

    def propose(
        self, weights: Weights, state: State, root: jax.Array, nodes: int
    ) -> tuple[State, TokenTree]:
        own, tree = state
        return own, TokenTree(tree.tokens.at[:, 0].set(root), tree.parents)

    def update(self, weights: Weights, state: State, verified: Verified) -> State:
        return self.drafter.update(weights, state, verified)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(NoDrafter):
    """Trees made by a host drafter: the state is the next step's trees, from `pack`."""

    def propose(
        self, weights: Weights, state: jax.Array, root: jax.Array, nodes: int
    ) -> tuple[State, TokenTree]:
        tokens, parents = state
        return state, TokenTree(tokens.at[:, 0].set(root), parents)


def self_drafter(drafter: DeviceDrafter) -> SelfDrafter | None:
    """The drafter if it drafts with the target, also where its trees were proposed before."""
    own = drafter.drafter if isinstance(drafter, Proposed) else drafter
    return own if isinstance(own, SelfDrafter) else None


def readable(
    drafter: DeviceDrafter, weights: Weights, params: Params, cache: KVCache, config: ModelConfig
) -> Weights:
    """What `propose` and `update` read: the drafter's own `weights`, or the target."""
    return weights if self_drafter(drafter) is None else Target(params, cache, config)
