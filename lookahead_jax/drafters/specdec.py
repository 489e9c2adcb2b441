"""specdec: a chain by a small model that ends where a trained head expects a rejection.

SpecDec++ (Huang et al. 2024, arXiv:2405.19715). B batch, P nodes, D draft model dim.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp

from lookahead_jax.decoding.device_drafter import Weights
from lookahead_jax.decoding.tree import TokenTree, chain, root_only
from lookahead_jax.drafters._branches import open_branches, read_newest
from lookahead_jax.drafters.draft_model import DraftCache, DraftModel
from lookahead_jax.model.decoder import logits
from lookahead_jax.modules.acceptance_head import (
    AcceptanceHead,
    acceptance_logits,
    load_acceptance_head,
)
from lookahead_jax.modules.head_files import beside

_HEAD = "acceptance_head"  # beside the draft model's own parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecDec(DraftModel):
    """The draft model's likeliest tokens, until one of them is probably rejected.

    The head gives the probability that a token is accepted once the draft model has read it. The
    newest token is therefore not judged: a chain ends with the token after the one that made the
    rejection of some token likelier than `threshold`. The draft model runs until all rows have
    ended. The head sees what the source's sees; tokens are accepted by the target's own choice
    instead of the source's rejection sampling.
    """

    head: AcceptanceHead | str | os.PathLike = dataclasses.field(compare=False, repr=False)
    """The acceptance head, or a file that `lookahead train specdec` wrote."""
    depth: int = 20
    """Longest chain."""
    least: int = 2
    """Shortest chain."""
    threshold: float = 0.3
    """A chain ends when a rejection in it is likelier than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.least <= self.depth:
            raise ValueError(f"least={self.least} must be from 1 to depth={self.depth}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be from 0 to 1")
        head, params = self.head, self.model.params
        if not isinstance(head, AcceptanceHead):
            head = load_acceptance_head(head, params=params)
        if head.out.shape[0] != self.config.hidden_size:
            raise ValueError(
                f"the acceptance head reads {head.out.shape[0]} values and the draft model has "
                f"{self.config.hidden_size}: train one for this model with lookahead train specdec"
            )
        object.__setattr__(self, "head", beside(head, params))

    @property
    def weights(self) -> Weights:
        return {**self.model.params, _HEAD: self.head}

    def propose(
        self, weights: Weights, state: DraftCache, root: jax.Array, nodes: int
    ) -> tuple[DraftCache, TokenTree]:
        state = state.settled()
        if nodes == 1:
            return state, root_only(root)
        longest, batch = min(self.depth, nodes - 1), len(root)

        def unfinished(carry: tuple) -> jax.Array:
            length, _, newest, *_ = carry
            return (length < longest) & (newest >= 0).any()

        def write(carry: tuple) -> tuple:
            length, branches, newest, intact, drafts = carry
            branches, hidden = read_newest(
                weights, state.cache, branches, newest, config=self.config
            )
            likeliest = jnp.argmax(logits(weights, hidden[:, None], config=self.config)[:, 0], -1)
            drafts = drafts.at[:, length].set(jnp.where(newest >= 0, likeliest, -1))
            accepted = jax.nn.softmax(acceptance_logits(weights[_HEAD], hidden))[:, 1]
            intact = jnp.where(length > 0, intact * accepted, intact)  # the root is no draft
            ended = (length + 1 >= self.least) & (1.0 - intact > self.threshold)
            return length + 1, branches, jnp.where(ended, -1, drafts[:, length]), intact, drafts

        first = (
            jnp.int32(0), open_branches(state.cache, 1, depth=longest),
            jnp.where(state.running, root, -1), jnp.ones(batch, jnp.float32),
            jnp.full((batch, longest), -1, jnp.int32),
        )  # fmt: skip
        *_, drafts = jax.lax.while_loop(unfinished, write, first)
        return state, chain(root, drafts, nodes)
