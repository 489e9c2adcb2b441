"""combine: one tree from two drafters, both on the host or both on the device.

The drafts are merged by prefix: a node of each in turn, best first, until all nodes are used. A
node that both propose counts once and keeps the children of both.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.decoding.device_drafter import (
    DeviceDrafter,
    NoDrafter,
    SelfDrafter,
    State,
    Verified,
    Weights,
)
from lookahead_jax.decoding.host_drafter import Draft, HostDrafter
from lookahead_jax.decoding.tree import TokenTree, layout, root_only
from lookahead_jax.drafters.draft_model import DraftModel
from lookahead_jax.model.config import ModelConfig


class Combine:
    """Two host drafters as one."""

    def __init__(self, first: HostDrafter, second: HostDrafter):
        self._both = (first, second)

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        first, second = self._both
        first.begin(request, prompt)
        try:
            second.begin(request, prompt)
        except BaseException:  # the request has joined neither or both
            first.end(request)
            raise

    def observe(self, request: int, tokens: Sequence[int]) -> None:
        for drafter in self._both:
            drafter.observe(request, tokens)

    def propose(self, request: int, nodes: int, depth: int) -> Draft:
        return merge_drafts([d.propose(request, nodes, depth) for d in self._both], nodes)

    def end(self, request: int) -> None:
        for drafter in self._both:
            drafter.end(request)


@dataclasses.dataclass(frozen=True)
class CombineOnDevice:
    """Two device drafters as one. Raises ValueError for draft models, early_exit, `none`."""

    first: DeviceDrafter
    second: DeviceDrafter

    def __post_init__(self) -> None:
        for drafter in (self.first, self.second):
            if isinstance(drafter, NoDrafter):
                raise ValueError("nothing to combine: leave out `none`")
            if isinstance(drafter, SelfDrafter):  # only it reads the target
                raise ValueError("early_exit cannot be combined: use it alone")
            if isinstance(drafter, DraftModel):  # its cache takes only paths of its own tree
                raise ValueError(
                    "a draft model cannot be combined, since its cache takes only its own drafts: "
                    "use it alone"
                )

    @property
    def weights(self) -> Weights:
        return self.first.weights, self.second.weights

    def init(self, batch: int, room: int, config: ModelConfig) -> State:
        return self.first.init(batch, room, config), self.second.init(batch, room, config)

    def begin(self, weights: Weights, state: State, rows: jax.Array, prompts: jax.Array) -> State:
        return (
            self.first.begin(weights[0], state[0], rows, prompts),
            self.second.begin(weights[1], state[1], rows, prompts),
        )

    def propose(
        self, weights: Weights, state: State, root: jax.Array, nodes: int
    ) -> tuple[State, TokenTree]:
        first, one = self.first.propose(weights[0], state[0], root, nodes)
        second, other = self.second.propose(weights[1], state[1], root, nodes)
        return (first, second), root_only(root) if nodes == 1 else merge_trees(one, other)

    def update(self, weights: Weights, state: State, verified: Verified) -> State:
        return (
            self.first.update(weights[0], state[0], verified),
            self.second.update(weights[1], state[1], verified),
        )


def merge_drafts(drafts: Sequence[Draft], nodes: int) -> Draft:
    """The first `nodes` nodes of the union of drafts, a node of each in turn."""
    place: dict[tuple[int, int], int] = {}  # (merged parent, token) -> merged node
    merged = [[-1] * len(draft.tokens) for draft in drafts]
    for i in range(max((len(draft.tokens) for draft in drafts), default=0)):
        for draft, own in zip(drafts, merged, strict=True):
            if i >= len(draft.tokens):
                continue
            parent = int(draft.parents[i])
            above = -1 if parent < 0 else own[parent]
            if parent >= 0 and above < 0:
                continue  # its parent has no place
            key = (above, int(draft.tokens[i]))
            if key not in place and len(place) < nodes:
                place[key] = len(place)
            own[i] = place.get(key, -1)
    return Draft(
        np.asarray([token for _, token in place], np.int32),
        np.asarray([parent for parent, _ in place], np.int32),
    )


def merge_trees(one: TokenTree, other: TokenTree) -> TokenTree:
    """`merge_drafts` for two trees [B, P] of equal roots: the first P nodes of their union."""
    width = one.tokens.shape[1]
    a, a_path, a_parents = _paths(one)
    b, b_path, b_parents = _paths(other)
    # Nodes are equal if their paths are: which node of one tree is which of the other.
    same = (a_path[:, :, None] == b_path[:, None]).all(-1) & a[:, :, None] & b[:, None]
    index = jnp.arange(width, dtype=jnp.int32)[None]
    never = 2 * width
    turn = jnp.min(jnp.where(same, 2 * index[:, None] + 1, never), axis=2)
    turn = jnp.where(a, jnp.minimum(2 * index, turn), never)
    twin = same.any(1)
    turn = jnp.concatenate([turn, jnp.where(b & ~twin, 2 * index + 1, never)], axis=1)
    # Nodes of the second tree have the number of their twin, others follow the first tree's.
    number = jnp.where(twin, jnp.argmax(same, axis=1).astype(jnp.int32), width + index)
    parents = jnp.concatenate([a_parents, jnp.take_along_axis(number, b_parents, axis=1)], axis=1)
    tokens = jnp.concatenate([one.tokens, other.tokens], axis=1)
    order = jnp.argsort(turn, axis=1)[:, :width]
    place = jnp.argsort(jnp.argsort(turn, axis=1), axis=1).astype(jnp.int32)
    kept = jnp.take_along_axis(turn, order, axis=1) < never
    tokens = jnp.where(kept, jnp.take_along_axis(tokens, order, axis=1), -1)
    above = jnp.take_along_axis(place, jnp.take_along_axis(parents, order, axis=1), axis=1)
    return TokenTree(tokens, jnp.where(kept & (index > 0), above, -1))


def _paths(tree: TokenTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which nodes exist [B, P], the tokens on the way to each [B, P, P], -1 past it, parents."""
    batch, width = tree.tokens.shape
    laid = layout(
        tree, vocab_size=2**31 - 1, most=jnp.full(batch, width, jnp.int32),
        ends=jnp.zeros((1, 0), jnp.int32),
    )  # fmt: skip
    at = jnp.where(laid.ancestors, laid.depth[:, None], width)
    rows = jnp.arange(batch)[:, None, None], jnp.arange(width)[None, :, None]
    path = jnp.full((batch, width, width), -1, jnp.int32)
    path = path.at[*rows, at].set(tree.tokens[:, None], mode="drop")
    return laid.valid, path, laid.parents
