"""Sets of lookahead tokens on their way through the layers, and their losses.

Letters: V sets, B batch, T prompt, Y response, M lookahead tokens, N query heads.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lookahead_jax.kernels.importance import head_scores
from lookahead_jax.kernels.reductions import Reduce
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.layer_attention import LayerKind
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.modules.definition import LookaheadModules, observer_block
from lookahead_jax.policies.view import Queries
from lookahead_jax.prefilling.layer_pass import observe_layer
from lookahead_jax.train.loss import PAPER, LossConfig, LossParts, Response, check_loss
from lookahead_jax.train.restoration import Reading, next_token_divergence

# Floors of one entry's share and of the mass on the prompt. A single lookahead token may attend
# almost only to itself; its gradient has the inverse of their product, which must fit a float32.
_TINY = 1e-20
_LITTLE = 1e-15


def attention_on_prompt(
    queries: Queries,
    context: Context,
    kind: LayerKind,
    config: ModelConfig,
    *,
    reduce: Reduce = "mean",
) -> jax.Array:
    """Probability of each prompt entry under the observers: float32 [B, N, T]."""
    return head_scores(
        queries.q,
        queries.pos,
        context.k,
        context.pos,
        queries.own,
        scale=config.attn_scale,
        softcap=config.attn_softcap,
        window=kind.window,
        reduce=reduce,
        lse=queries.lse,
    )


def _normalised(scores: jax.Array) -> jax.Array:
    """Scores as a distribution over the prompt's entries; near zero where all scores are."""
    return scores / jnp.maximum(scores.sum(-1, keepdims=True), _LITTLE)


def divergence(target: jax.Array, predicted: jax.Array, skip: int = 0) -> jax.Array:
    """KL(target || predicted) of two sets of scores [B, N, T], each normalised: [B, N].

    The first `skip` entries do not count.
    """
    target, predicted = target[..., skip:], predicted[..., skip:]
    t, p = _normalised(target), _normalised(predicted)
    logs = jnp.log(jnp.maximum(t, _TINY)) - jnp.log(jnp.maximum(p, _TINY))
    return jnp.where(t > 0, t * logs, 0.0).sum(-1)


# Products with weights are kept for the backward pass (M rows); attention logits [N, M, T], which
# are not small, are computed again.
@partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    static_argnums=0,
)
def _predict(static, observer, layer, rows, seen):
    """Advances the lookahead rows by one layer: the rows, their divergence from the target, and,
    where they stay, their queries."""
    (config, skip, stays), (block, rope) = static, observer
    p, lora, kind = layer
    context, target = seen
    rows, queries = observe_layer(
        p, rows, block, rope, kind, context=context, lora=lora, config=config
    )
    loss = divergence(target, attention_on_prompt(queries, context, kind, config), skip)
    return rows, loss, queries if stays else None


class Observed(NamedTuple):
    """Sets of lookahead tokens between two layers."""

    rows: list[jax.Array]  # [B, M, D] each
    losses: jax.Array  # [V, B] sums over the layers so far
    restored: list[jax.Array | None]  # [B, Y, D] the response behind what each keeps, or None


class Observers:
    """Sets of lookahead tokens on their way through the layers."""

    def __init__(
        self,
        variants: Sequence[LookaheadModules],
        params: Params,
        length: jax.Array,
        responses: jax.Array,
        *,
        losses: Sequence[LossConfig] | None,
        config: ModelConfig,
    ):
        dtype = params["final_norm"].dtype
        self.blocks = [observer_block(modules, length, length, dtype=dtype) for modules in variants]
        self.ropes = [rope_tables(config, block.positions, length) for block in self.blocks]
        self.loras = [block.lora for block in self.blocks]
        self.losses = [PAPER] * len(variants) if losses is None else list(losses)
        self.config, self.params = config, params
        self.readings: list[Reading | None] = []
        for modules, loss in zip(variants, self.losses, strict=True):
            check_loss(modules.config, loss)
            reading = None
            if loss.memory:
                reading = Reading(
                    params, responses, length, tokens=modules.config.tokens, policy=loss.policy,
                    budgets=loss.budgets, config=config,
                )  # fmt: skip
            self.readings.append(reading)
        zero = jnp.zeros((len(variants), length.shape[0]), jnp.float32)
        restored = [None if reading is None else reading.block.x for reading in self.readings]
        self.start = Observed([block.x for block in self.blocks], zero, restored)

    @property
    def restores(self) -> bool:
        """Whether any set has a memory."""
        return any(reading is not None for reading in self.readings)

    @property
    def responses(self) -> set[Response]:
        """The targets that the losses need."""
        return {loss.response for loss in self.losses}

    def advance(
        self,
        p: Params,
        carry: Observed,
        loras: list[Params | None],
        kind: LayerKind,
        *,
        context: Context,
        targets: Mapping[Response, jax.Array],
    ) -> Observed:
        """One layer of every set; `targets` [B, N, T] by how they were reduced."""
        predicted = [
            _predict(
                (self.config, loss.skip, reading is not None), observer, (p, lora, kind), rows,
                (context, targets[loss.response]),
            )
            for *observer, loss, reading, lora, rows in zip(
                self.blocks, self.ropes, self.losses, self.readings, loras, carry.rows, strict=True
            )
        ]  # fmt: skip
        restored = [
            None
            if reading is None or rows is None
            else reading.advance(p, rows, kind, context=context, queries=queries)
            for reading, rows, (*_, queries) in zip(
                self.readings, carry.restored, predicted, strict=True
            )
        ]
        losses = carry.losses + jnp.stack([loss.mean(-1) for _, loss, _ in predicted])
        return Observed([rows for rows, *_ in predicted], losses, restored)

    def parts(self, carry: Observed, response: jax.Array, answered: jax.Array) -> LossParts:
        """The losses after the last layer; `response` [B, Y, D] is that behind the whole prompt."""
        importance = jnp.where(answered[None] > 0, carry.losses / self.config.num_layers, 0.0)
        memory = [
            jnp.zeros_like(answered, jnp.float32)
            if rows is None
            else next_token_divergence(self.params, response, rows, answered, config=self.config)
            for rows in carry.restored
        ]
        return LossParts(importance, jnp.stack(memory))
