"""mixture: one tree from several drafters, which share its nodes by what they were right about.

All drafters propose at every step and are merged into one tree (_merge.py), as specialised drafters
are in TAPS (arXiv:2603.27027) and CoSine (arXiv:2503.10325). As in TABED (arXiv:2601.20357) with
its weight "block-efficiency", a drafter's weight is how many of the emitted tokens its own draft
held, whether they had a place in the tree or not. TABED adds up all steps of a request; here it is
a moving average, so that the weights follow a text that changes. B batch, P nodes, N drafters.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from lookahead_jax.decoding.device_drafter import (
    DeviceDrafter,
    DrawingDrafter,
    NoDrafter,
    SelfDrafter,
    State,
    Verified,
    Weights,
)
from lookahead_jax.decoding.draft_packing import path_of
from lookahead_jax.decoding.host_drafter import Draft, HostDrafter
from lookahead_jax.decoding.tree import NODE_BUCKETS, TokenTree, root_only
from lookahead_jax.drafters._merge import merge_drafts, merge_trees
from lookahead_jax.drafters.draft_model import DraftModel
from lookahead_jax.drafters.open_requests import OpenRequests
from lookahead_jax.model.config import ModelConfig

RATE = 0.125  # of the newest draft in the moving average
FIRST = 1.0  # tokens per draft that a request begins with, for all drafters
LEAST = 0.125  # the smallest weight: a drafter that is always wrong keeps a small share


@dataclasses.dataclass
class _Request:
    """What the mixture knows of an open request."""

    means: list[float]  # tokens that each drafter's draft was right about
    drafts: list[Draft]  # of each drafter, for the tokens that are emitted next


class Mixture:
    """Host drafters as one. Each request has weights of its own.

    A draft without nodes says nothing about its drafter and leaves its weight as it is.
    """

    def __init__(self, drafters: Sequence[HostDrafter]):
        self._drafters = tuple(drafters)
        self._requests: OpenRequests[_Request] = OpenRequests()

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        joined = []
        try:
            for drafter in self._drafters:
                drafter.begin(request, prompt)
                joined.append(drafter)
        except BaseException:  # the request has joined all of them or none
            for drafter in joined:
                drafter.end(request)
            raise
        self._requests[request] = _Request([FIRST] * len(self._drafters), [])

    def observe(self, request: int, tokens: Sequence[int]) -> None:
        own = self._requests[request]
        for i, draft in enumerate(own.drafts):
            if len(draft.tokens):
                own.means[i] += RATE * (len(path_of(draft, tokens)) - own.means[i])
        own.drafts = []
        for drafter in self._drafters:
            drafter.observe(request, tokens)

    def propose(self, request: int, nodes: int, depth: int) -> Draft:
        own = self._requests[request]
        own.drafts = [drafter.propose(request, nodes, depth) for drafter in self._drafters]
        return merge_drafts(own.drafts, [max(mean, LEAST) for mean in own.means], nodes)

    def end(self, request: int) -> None:
        del self._requests[request]
        for drafter in self._drafters:
            drafter.end(request)


@struct.dataclass
class Mixed:
    """The drafters' states, how good they were, and their trees for the next step."""

    own: tuple[State, ...]
    means: jax.Array  # [B, N] float32 tokens that each drafter's tree was right about
    trees: TokenTree  # [B, N, 128], unused nodes -1


@dataclasses.dataclass(frozen=True)
class MixtureOnDevice:
    """Device drafters as one. Each row has weights of its own.

    A tree without nodes says nothing about its drafter and leaves its weight as it is. The merged
    tree is no deeper than the caches of draft models allow. Raises ValueError for `none`, for
    early_exit, and for drafters that draw their trees, since a merged tree is not drawn.
    """

    drafters: tuple[DeviceDrafter, ...]

    def __post_init__(self) -> None:
        for drafter in self.drafters:
            if type(drafter) is NoDrafter:
                raise ValueError("nothing to combine: leave out `none`")
            if isinstance(drafter, SelfDrafter):  # only it reads the target
                raise ValueError("early_exit cannot be combined: use it alone")
            if isinstance(drafter, DrawingDrafter):
                raise ValueError(
                    "drawn_model cannot be combined, since a merged tree is not drawn: take "
                    "draft_model, or use it alone"
                )

    @property
    def depth(self) -> int:
        """The longest path that all drafters can take up when it is accepted."""
        models = [drafter for drafter in self.drafters if isinstance(drafter, DraftModel)]
        return min((drafter.depth for drafter in models), default=NODE_BUCKETS[-1])

    @property
    def weights(self) -> Weights:
        return tuple(drafter.weights for drafter in self.drafters)

    def init(self, batch: int, room: int, config: ModelConfig) -> Mixed:
        count = len(self.drafters)
        shape = batch, count, NODE_BUCKETS[-1]
        return Mixed(
            tuple(drafter.init(batch, room, config) for drafter in self.drafters),
            jnp.full((batch, count), FIRST, jnp.float32),
            # Two arrays, since both are donated.
            TokenTree(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -1, jnp.int32)),
        )

    def begin(self, weights: Weights, state: Mixed, rows: jax.Array, prompts: jax.Array) -> Mixed:
        own = tuple(
            drafter.begin(each, before, rows, prompts)
            for drafter, each, before in zip(self.drafters, weights, state.own, strict=True)
        )
        return dataclasses.replace(state, own=own, means=state.means.at[rows].set(FIRST))

    def propose(
        self, weights: Weights, state: Mixed, root: jax.Array, nodes: int
    ) -> tuple[Mixed, TokenTree]:
        own, trees = zip(
            *(
                drafter.propose(each, before, root, nodes)
                for drafter, each, before in zip(self.drafters, weights, state.own, strict=True)
            ),
            strict=True,
        )
        pad = [(0, 0), (0, 0), (0, NODE_BUCKETS[-1] - nodes)]
        side_by_side = jax.tree.map(
            lambda *arrays: jnp.pad(jnp.stack(arrays, axis=1), pad, constant_values=-1), *trees
        )
        state = Mixed(own, state.means, side_by_side)
        if nodes == 1:
            return state, root_only(root)
        return state, merge_trees(trees, jnp.maximum(state.means, LEAST), self.depth)

    def update(self, weights: Weights, state: Mixed, verified: Verified) -> Mixed:
        accepted = verified.accepted
        right = _right(state.trees, accepted.emitted).astype(jnp.float32)
        proposed = (state.trees.tokens[..., 1:] >= 0).any(-1) & (accepted.count > 0)[:, None]
        means = jnp.where(proposed, state.means + RATE * (right - state.means), state.means)
        own = tuple(
            drafter.update(each, before, verified)
            for drafter, each, before in zip(self.drafters, weights, state.own, strict=True)
        )
        return dataclasses.replace(state, own=own, means=means)


def _right(trees: TokenTree, emitted: Int[Array, "B P"]) -> Int[Array, "B N"]:
    """How many of the emitted tokens, -1 past their end, trees [B, N, W] hold on one path."""
    index = jnp.arange(trees.tokens.shape[2], dtype=jnp.int32)

    def step(carry):
        depth, node, right, follows = carry
        token = emitted[:, depth, None]
        children = (trees.parents == node[..., None]) & (trees.tokens == token[..., None])
        children &= (index > 0)[None, None]
        follows &= children.any(-1) & (token >= 0)
        node = jnp.argmax(children, axis=-1).astype(jnp.int32)
        return depth + 1, node, right + follows.astype(jnp.int32), follows

    def unfinished(carry):
        depth, _, _, follows = carry
        return (depth < emitted.shape[1]) & follows.any()

    zero = jnp.zeros(trees.tokens.shape[:2], jnp.int32)
    return jax.lax.while_loop(
        unfinished, step, (jnp.int32(0), zero, zero, jnp.ones(zero.shape, bool))
    )[2]
