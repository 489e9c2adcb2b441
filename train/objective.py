"""The loss of LookaheadKV: predicted against true importance of each prompt entry.

One pass over the prompt serves both. In each layer the response (rows of the unchanged model) and
the lookahead tokens (rows with the LoRA) attend to the same keys. Gradients reach the lookahead
rows only, so the backward pass grows with their number and not with the prompt.
Letters: B batch, T prompt, Y response, M lookahead tokens, N query heads, L layers.
Source: LookaheadKV (arXiv 2603.10899), section 3: KL per layer and query head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.decoder import embed, scan_layers
from lookahead_jax.model.layer_attention import LayerKind, layer_kinds
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.view import Queries
from lookahead_jax.prefilling.layer_pass import (
    CHUNK,
    Buffers,
    layer_buffers,
    observe_layer,
    prompt_layer,
    prompt_layout,
)
from lookahead_jax.train.loss import PAPER, LossConfig, LossParts, Response
from lookahead_jax.train.observers import Observers, attention_on_prompt
from lookahead_jax.train.restoration import response_block


class BaseForward(NamedTuple):
    """What the base model, which training does not change, computes for a batch of rows."""

    k: jax.Array  # [L, B, K, T, H] keys of the prompt
    v: jax.Array  # [L, B, K, T, H]
    mean: jax.Array  # [L, B, N, T] float32 attention of the response's tokens, averaged
    max: jax.Array  # [L, B, N, T] float32 the largest instead
    length: jax.Array  # [B] int32 tokens of the prompt
    answered: jax.Array  # [B] int32 tokens of the response
    responses: jax.Array  # [B, Y] int32, padded with -1


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
        self.config = config
        prompts, self.prompt = prompt_layout(prompts, 0, chunk, config)
        self.answered = (responses >= 0).sum(1, dtype=jnp.int32)
        self.response = response_block(
            params, responses, self.prompt.length, self.prompt.span, config=config
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


def loss_parts(
    variants: Sequence[LookaheadModules],
    params: Params,
    prompts: Int[Array, "B T"],
    responses: Int[Array, "B Y"],
    *,
    config: ModelConfig,
    losses: Sequence[LossConfig] | None = None,
    chunk: int | None = CHUNK,
) -> LossParts:
    """The parts of `lookahead_losses`."""
    base = _Base(params, prompts, responses, chunk, config)
    observers = Observers(
        variants, params, base.prompt.length, responses, losses=losses, config=config
    )

    def step(carry, inputs):
        rows, observed = carry
        p, loras, kind = inputs
        rows, context, queries = base.advance(p, rows, kind)
        targets: dict[Response, jax.Array] = {
            reduce: attention_on_prompt(queries, context, kind, config, reduce=reduce)
            for reduce in observers.responses
        }
        rows, context, targets = jax.lax.stop_gradient((rows, context, targets))
        observed = observers.advance(p, observed, loras, kind, context=context, targets=targets)
        return (rows, observed), None

    carry = base.start, observers.start
    (rows, observed), _ = scan_layers(
        step, carry, params["layers"], observers.loras, layer_kinds(config)
    )
    return observers.parts(observed, rows.response, base.answered)


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
    full cache, the prediction that of the lookahead tokens. For modules with a memory, the weighted
    divergence of the response's next tokens is added (restoration.py). The prompt and the target
    are computed once, for all variants, which may differ in everything; `losses` has the loss of
    each, by default the paper's. Differentiable in `variants` alone. A row without a response has a
    loss of 0. ValueError for a loss that does not fit its modules (`check_loss`).
    """
    parts = loss_parts(
        variants, params, prompts, responses, config=config, losses=losses, chunk=chunk
    )
    return parts.total([PAPER] * len(variants) if losses is None else losses)


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
            attention_on_prompt(queries, context, kind, config, reduce=reduce)[..., :width]
            for reduce in ("mean", "max")
        )
        k, v = (a[:, :, :width].astype(dtype) for a in (context.k, context.v))
        return rows, (k, v, mean, largest)

    _, (k, v, mean, largest) = scan_layers(
        step, base.start, params["layers"], None, layer_kinds(config)
    )
    return BaseForward(k, v, mean, largest, base.prompt.length, base.answered, responses)


def parts_behind(
    variants: Sequence[LookaheadModules],
    params: Params,
    forward: BaseForward,
    *,
    config: ModelConfig,
    losses: Sequence[LossConfig] | None = None,
) -> LossParts:
    """`loss_parts` of rows whose base forward is known.

    Only the lookahead tokens are run, and with a memory the response, behind the whole prompt and
    behind what is kept.
    """
    steps = jnp.arange(forward.k.shape[3], dtype=jnp.int32)[None]
    positions = jnp.where(steps < forward.length[:, None], steps, -1)[:, None]
    dtype, length = params["final_norm"].dtype, forward.length
    observers = Observers(variants, params, length, forward.responses, losses=losses, config=config)
    block = response_block(params, forward.responses, length, length, config=config)
    rope = rope_tables(config, block.positions, length)

    def step(carry, inputs):
        response, observed = carry
        p, loras, (kind, k, v, targets) = inputs
        context = Context(k.astype(dtype), v.astype(dtype), positions)
        if observers.restores:
            response, _ = observe_layer(
                p, response, block, rope, kind, context=context, lora=None, config=config
            )
        observed = observers.advance(p, observed, loras, kind, context=context, targets=targets)
        return (response, observed), None

    targets = {reduce: getattr(forward, reduce) for reduce in observers.responses}
    per_layer = layer_kinds(config), forward.k, forward.v, targets
    carry = block.x, observers.start
    (response, observed), _ = scan_layers(step, carry, params["layers"], observers.loras, per_layer)
    return observers.parts(observed, response, forward.answered)


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
