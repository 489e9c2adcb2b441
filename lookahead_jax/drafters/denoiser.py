"""denoiser: a whole block of tokens at once, by masked denoising behind the last hidden state.

After DEER (arXiv 2512.15176), which fills the block in one pass and lets the target verify it, and
DiffuSpec (arXiv 2510.02358), which searches paths among the candidates of all places. Both draft
with a diffusion language model; here it is a small head (modules/denoiser.py). B batch, P nodes,
T tokens of a block, C candidates of a place, D model.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
from flax import struct

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.device_drafter import Verified, Weights
from lookahead_jax.decoding.tree import TokenTree, root_only
from lookahead_jax.drafters.draft_model import best_first
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.modules.denoiser import (
    DenoiserHead,
    DenoiserHeadConfig,
    block_logits,
    target_tables,
)
from lookahead_jax.modules.denoiser_files import load_denoiser_head
from lookahead_jax.modules.head_files import beside

CANDIDATES = 8  # of a place, as many as the second level of the smallest tree could use


@struct.dataclass
class LastHidden:
    """What the target knew at the end of each row's last step."""

    hidden: jax.Array  # [B, D] of the last accepted node, which chose the root
    known: jax.Array  # [B] bool; False before the row's first step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The P - 1 likeliest paths among 8 candidates a place, if places were independent.

    They are independent given the hidden state and what earlier passes have filled in. Nothing is
    proposed in a row's first step, in which its hidden state is not known yet.
    """

    target: Model = dataclasses.field(compare=False, repr=False)
    """The model that it drafts for, which the head was trained for."""
    head: DenoiserHead | str | os.PathLike = dataclasses.field(compare=False, repr=False)
    """The head, or its file from `lookahead train denoiser`."""
    passes: int = 1
    """Passes over the block. Each but the last fills in the places it is surest of."""
    weights: Weights = dataclasses.field(init=False, compare=False, repr=False)
    sizes: DenoiserHeadConfig = dataclasses.field(init=False, repr=False)
    config: ModelConfig = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        params = self.target.params
        head = self.head
        if not isinstance(head, DenoiserHead):
            head = load_denoiser_head(head, params=params)
        if not 1 <= self.passes <= head.config.tokens:
            raise ValueError(f"passes={self.passes} must be 1 to {head.config.tokens}")
        if (size := head.params["out"].shape[1]) != self.target.config.hidden_size:
            raise ValueError(
                f"the head was made for a model of width {size}, and this one has "
                f"{self.target.config.hidden_size}"
            )
        head = beside(head, params)
        tables = target_tables(params, head.vocabulary, config=self.target.config)
        object.__setattr__(self, "weights", (head, tables))
        object.__setattr__(self, "sizes", head.config)
        object.__setattr__(self, "config", self.target.config)

    def init(self, batch: int, room: int, config: ModelConfig) -> LastHidden:
        if config != self.config:
            raise ValueError("the denoiser was made for another model: give target=")
        dtype = self.target.params["final_norm"].dtype
        return LastHidden(jnp.zeros((batch, config.hidden_size), dtype), jnp.zeros(batch, bool))

    def begin(
        self, weights: Weights, state: LastHidden, rows: jax.Array, prompts: jax.Array
    ) -> LastHidden:
        return LastHidden(state.hidden, state.known.at[rows].set(False))

    def propose(
        self, weights: Weights, state: LastHidden, root: jax.Array, nodes: int
    ) -> tuple[LastHidden, TokenTree]:
        if nodes == 1:
            return state, root_only(root)
        tree = likeliest_paths(root, *self._candidates(weights, state.hidden, root), nodes)
        there = state.known[:, None] | (jnp.arange(nodes) == 0)[None]
        return state, TokenTree(jnp.where(there, tree.tokens, -1), tree.parents)

    def update(self, weights: Weights, state: LastHidden, verified: Verified) -> LastHidden:
        count = verified.accepted.count
        end = jnp.maximum(count - 1, 0)[:, None]
        last = jnp.take_along_axis(verified.accepted.path, end, axis=1)
        hidden = jnp.take_along_axis(verified.hidden, last[..., None], axis=1)[:, 0]
        ran = count > 0
        return LastHidden(jnp.where(ran[:, None], hidden, state.hidden), state.known | ran)

    def _candidates(
        self, weights: Weights, hidden: jax.Array, root: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The likeliest tokens of each place, best first: log probabilities and ids [B, T, C]."""
        head, tables = weights
        batch, places = len(root), self.sizes.tokens

        def fill(given: jax.Array) -> tuple[jax.Array, jax.Array]:
            raw = block_logits(head, tables, hidden, root, given, config=self.config)
            best, token = jax.lax.top_k(raw, min(CANDIDATES, raw.shape[-1]))
            best = best - jax.nn.logsumexp(raw, axis=-1, keepdims=True)
            return best, token if head.vocabulary is None else head.vocabulary[token]

        fixed = jnp.zeros((batch, places), bool)
        chances, token = fill(jnp.full((batch, places), -1, jnp.int32))
        for done in range(1, self.passes):
            sure = jnp.where(fixed, jnp.inf, chances[..., 0])
            rank = jnp.argsort(jnp.argsort(-sure, axis=1), axis=1)
            fixed = rank < done * places // self.passes
            fresh = fill(jnp.where(fixed, token[..., 0], -1))
            # A place that is filled in keeps the candidates that it was filled from.
            chances, token = (
                jnp.where(fixed[..., None], old, new)
                for old, new in zip((chances, token), fresh, strict=True)
            )
        return chances, token


def likeliest_paths(root: jax.Array, chances: jax.Array, token: jax.Array, nodes: int) -> TokenTree:
    """The `nodes` - 1 likeliest paths below `root` [B], best first.

    A path takes one of the C candidates of each place in order: `token` and the log probabilities
    `chances` [B, T, C], best first. Its log probability is the sum of theirs, so that none exceeds
    that of the path it continues, and the paths form a tree.
    """
    batch, _, count = token.shape
    value = jnp.zeros((batch, 1), jnp.float32)  # of the newest level
    values, tokens = [value], [root[:, None]]
    parents, first = [jnp.full((batch, 1), -1, jnp.int32)], 0
    for level in range(min(token.shape[1], nodes - 1)):
        newest = value.shape[1]
        paths = (value[..., None] + chances[:, level, None]).reshape(batch, -1)
        value, at = jax.lax.top_k(paths, min(nodes - 1, paths.shape[1]))
        values.append(value)
        tokens.append(jnp.take_along_axis(token[:, level], at % count, axis=1))
        parents.append((first + at // count).astype(jnp.int32))
        first += newest
    tree = TokenTree(jnp.concatenate(tokens, axis=1), jnp.concatenate(parents, axis=1))
    tree = best_first(tree, jnp.concatenate(values, axis=1))
    short = max(nodes - tree.tokens.shape[1], 0)
    return jax.tree.map(
        lambda a: jnp.pad(a[:, :nodes], [(0, 0), (0, short)], constant_values=-1), tree
    )
