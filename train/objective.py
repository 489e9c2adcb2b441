"""The loss of LookaheadKV: predicted against true importance of each prompt entry.

One pass over the prompt serves both. In each layer the response (rows of the unchanged model) and
the lookahead tokens (rows with the LoRA) attend to the same keys. Gradients reach the lookahead
rows only, so the backward pass grows with their number and not with the prompt.
Letters: B batch, T prompt, Y response, M lookahead tokens, N query heads, L layers.
Source: LookaheadKV (arXiv 2603.10899), section 3: KL per layer and query head.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lookahead_jax.host.integers import check_integer
from lookahead_jax.kernels.importance import head_scores
from lookahead_jax.kernels.reductions import Reduce
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.decoder import Block, embed, scan_layers
from lookahead_jax.model.layer_attention import LayerKind, layer_kinds
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.modules.definition import LookaheadModules, observer_block
from lookahead_jax.policies.view import Queries
from lookahead_jax.prefilling.layer_pass import (
    CHUNK,
    Buffers,
    layer_buffers,
    observe_layer,
    prompt_layer,
    prompt_layout,
)

# Floors of one entry's share and of the mass on the prompt. A single lookahead token may attend
# almost only to itself; its gradient has the inverse of their product, which must fit a float32.
_TINY = 1e-20
_LITTLE = 1e-15


def _attention_on_prompt(
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
    """Advances the lookahead rows by one layer: the rows, and their divergence from the target."""
    (config, skip), (block, rope) = static, observer
    p, lora, kind = layer
    context, target = seen
    rows, queries = observe_layer(
        p, rows, block, rope, kind, context=context, lora=lora, config=config
    )
    return rows, divergence(target, _attention_on_prompt(queries, context, kind, config), skip)


Response = Literal["mean", "max"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the loss compares. The defaults are those of the paper."""

    skip: int = 0
    """Number of leading prompt entries that the loss leaves out: attention sinks, which hold most
    of the mass."""
    response: Response = "mean"
    """How the attention of a response's tokens becomes one target."""

    def __post_init__(self) -> None:
        check_integer("loss skip", self.skip, least=0)
        if self.response not in get_args(Response):
            raise ValueError(f"unknown response {self.response!r}; known: mean, max")


PAPER = LossConfig()


class BaseForward(NamedTuple):
    """What the base model, which training does not change, computes for a batch of rows."""

    k: jax.Array  # [L, B, K, T, H] keys of the prompt
    v: jax.Array  # [L, B, K, T, H]
    mean: jax.Array  # [L, B, N, T] float32 attention of the response's tokens, averaged
    max: jax.Array  # [L, B, N, T] float32 the largest instead
    length: jax.Array  # [B] int32 tokens of the prompt
    answered: jax.Array  # [B] int32 tokens of the response


class _Rows(NamedTuple):
    """Rows of the base model between two layers."""

    prompt: jax.Array  # [B, T, D]
    buffers: Buffers
    response: jax.Array  # [B, Y, D]


class _Base:
    """Prompts and responses on their way through the base model, layer by layer."""

    def __init__(
        self,
        params: Params,
        prompts: jax.Array,
        responses: jax.Array,
        chunk: int | None,
        config: ModelConfig,
    ):
        width = responses.shape[1]
        self.config = config
        prompts, self.prompt = prompt_layout(prompts, 0, chunk, config)
        self.answered = (responses >= 0).sum(1, dtype=jnp.int32)
        steps = self.prompt.length[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        self.response = Block(
            x=embed(params, responses, config=config),
            positions=jnp.where(responses >= 0, steps, -1),
            rope_span=self.prompt.span,
        )
        self.rope = rope_tables(config, self.response.positions, self.prompt.span)
        x = embed(params, prompts, config=config)
        self.start = _Rows(x, layer_buffers(self.prompt, x.dtype, config), self.response.x)

    def advance(self, p: Params, rows: _Rows, kind: LayerKind) -> tuple[_Rows, Context, Queries]:
        """One layer: the next rows, the prompt's keys and values, the response's queries."""
        read = prompt_layer(
            p, rows.prompt, rows.buffers, self.prompt, kind, policy=None, config=self.config
        )
        # No slot bounds: a sweep with traced bounds could not be differentiated.
        context = Context(*read.buffers, self.prompt.positions[:, None])
        response, queries = observe_layer(
            p, rows.response, self.response, self.rope, kind,
            context=context, lora=None, config=self.config,
        )  # fmt: skip
        return _Rows(read.x, read.buffers, response), context, queries


class _Observers:
    """Sets of lookahead tokens on their way through the layers, and their losses so far."""

    def __init__(
        self,
        variants: Sequence[LookaheadModules],
        length: jax.Array,
        dtype: DTypeLike,
        losses: Sequence[LossConfig] | None,
        config: ModelConfig,
    ):
        self.blocks = [observer_block(modules, length, length, dtype=dtype) for modules in variants]
        self.ropes = [rope_tables(config, block.positions, length) for block in self.blocks]
        self.loras = [block.lora for block in self.blocks]
        self.losses = [PAPER] * len(variants) if losses is None else list(losses)
        self.config = config
        zero = jnp.zeros((len(variants), length.shape[0]), jnp.float32)
        self.start = [block.x for block in self.blocks], zero

    @property
    def responses(self) -> set[Response]:
        """The targets that the losses need."""
        return {loss.response for loss in self.losses}

    def advance(
        self,
        p: Params,
        carry: tuple[list[jax.Array], jax.Array],
        loras: list[Params | None],
        kind: LayerKind,
        *,
        context: Context,
        targets: Mapping[Response, jax.Array],
    ) -> tuple[list[jax.Array], jax.Array]:
        """One layer of every set; `targets` [B, N, T] by how they were reduced."""
        rows, losses = carry
        predicted = [
            _predict(
                (self.config, loss.skip), observer, (p, lora, kind), r,
                (context, targets[loss.response]),
            )
            for *observer, loss, lora, r in zip(
                self.blocks, self.ropes, self.losses, loras, rows, strict=True
            )
        ]  # fmt: skip
        losses = losses + jnp.stack([loss.mean(-1) for _, loss in predicted])
        return [rows for rows, _ in predicted], losses

    def mean(self, carry, answered: jax.Array) -> jax.Array:
        """The losses after the last layer, [V, B]."""
        return jnp.where(answered[None] > 0, carry[1] / self.config.num_layers, 0.0)


def lookahead_losses(
    variants: Sequence[LookaheadModules],
    params: Params,
    prompts: Int[Array, "B T"],
    responses: Int[Array, "B Y"],
    *,
    config: ModelConfig,
    losses: Sequence[LossConfig] | None = None,
    chunk: int | None = CHUNK,
) -> Float[Array, "V B"]:
    """The loss of V sets of modules on the same rows: float32 [V, B].

    Mean over layers and query heads of KL(target || predicted). `prompts` and `responses` are
    int32, right-padded with -1. The target is the attention of the response's queries under the
    full cache, the prediction that of the lookahead tokens. The prompt and the target are computed
    once, for all variants, which may differ in everything; `losses` has the loss of each, by
    default the paper's. Differentiable in `variants` alone. A row without a response has a loss
    of 0.
    """
    base = _Base(params, prompts, responses, chunk, config)
    observers = _Observers(variants, base.prompt.length, base.response.x.dtype, losses, config)

    def step(carry, inputs):
        rows, observed = carry
        p, loras, kind = inputs
        rows, context, queries = base.advance(p, rows, kind)
        targets: dict[Response, jax.Array] = {
            reduce: _attention_on_prompt(queries, context, kind, config, reduce=reduce)
            for reduce in observers.responses
        }
        rows, context, targets = jax.lax.stop_gradient((rows, context, targets))
        observed = observers.advance(p, observed, loras, kind, context=context, targets=targets)
        return (rows, observed), None

    carry = base.start, observers.start
    (_, observed), _ = scan_layers(
        step, carry, params["layers"], observers.loras, layer_kinds(config)
    )
    return observers.mean(observed, base.answered)


def base_forward(
    params: Params,
    prompts: Int[Array, "B T"],
    responses: Int[Array, "B Y"],
    *,
    config: ModelConfig,
    dtype: DTypeLike,
    chunk: int | None = CHUNK,
) -> BaseForward:
    """The part of `lookahead_losses` that does not depend on the modules, with k, v in `dtype`."""
    base = _Base(params, prompts, responses, chunk, config)
    width = prompts.shape[1]

    def step(rows, inputs):
        p, _, kind = inputs
        rows, context, queries = base.advance(p, rows, kind)
        mean, largest = (
            _attention_on_prompt(queries, context, kind, config, reduce=reduce)[..., :width]
            for reduce in ("mean", "max")
        )
        k, v = (a[:, :, :width].astype(dtype) for a in (context.k, context.v))
        return rows, (k, v, mean, largest)

    _, (k, v, mean, largest) = scan_layers(
        step, base.start, params["layers"], None, layer_kinds(config)
    )
    return BaseForward(k, v, mean, largest, base.prompt.length, base.answered)


def losses_behind(
    variants: Sequence[LookaheadModules],
    params: Params,
    forward: BaseForward,
    *,
    config: ModelConfig,
    losses: Sequence[LossConfig] | None = None,
) -> Float[Array, "V B"]:
    """`lookahead_losses` of rows whose base forward is known: only the lookahead tokens are run."""
    steps = jnp.arange(forward.k.shape[3], dtype=jnp.int32)[None]
    positions = jnp.where(steps < forward.length[:, None], steps, -1)[:, None]
    dtype = params["final_norm"].dtype
    observers = _Observers(variants, forward.length, dtype, losses, config)

    def step(observed, inputs):
        p, loras, (kind, k, v, targets) = inputs
        context = Context(k.astype(dtype), v.astype(dtype), positions)
        observed = observers.advance(p, observed, loras, kind, context=context, targets=targets)
        return observed, None

    targets = {reduce: getattr(forward, reduce) for reduce in observers.responses}
    per_layer = layer_kinds(config), forward.k, forward.v, targets
    observed, _ = scan_layers(step, observers.start, params["layers"], observers.loras, per_layer)
    return observers.mean(observed, forward.answered)


def lookahead_loss(
    modules: LookaheadModules,
    params: Params,
    prompts: Int[Array, "B T"],
    responses: Int[Array, "B Y"],
    *,
    config: ModelConfig,
    loss: LossConfig = PAPER,
    chunk: int | None = CHUNK,
) -> Float[Array, " B"]:
    """`lookahead_losses` of one set of modules: float32 [B]."""
    losses = lookahead_losses(
        [modules], params, prompts, responses, config=config, losses=[loss], chunk=chunk
    )
    return losses[0]
