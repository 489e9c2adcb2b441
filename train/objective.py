"""The loss of LookaheadKV: predicted against true importance of each prompt entry.

One pass over the prompt serves both. In each layer the response (rows of the unchanged model) and
the lookahead tokens (rows with the LoRA) attend to the same keys. Gradients reach the lookahead
rows only, so the backward pass grows with their number and not with the prompt.
Letters: B batch, T prompt, Y response, M lookahead tokens, N query heads, L layers.
Source: LookaheadKV (arXiv 2603.10899), section 3: KL per layer and query head.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lookahead_jax.kernels.importance import head_scores
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, Context, LayerKind, embed, layer_kinds, scan_layers
from lookahead_jax.model.params import Params
from lookahead_jax.model.rope import rope_tables
from lookahead_jax.modules.definition import LookaheadModules, observer_block
from lookahead_jax.policies.view import Queries
from lookahead_jax.prefilling.layer_pass import (
    CHUNK,
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
    queries: Queries, context: Context, kind: LayerKind, config: ModelConfig
) -> jax.Array:
    """Mean probability of each prompt entry under the observers: float32 [B, N, T]."""
    return head_scores(
        queries.q,
        queries.pos,
        context.k,
        context.pos,
        queries.own,
        scale=config.attn_scale,
        softcap=config.attn_softcap,
        window=kind.window,
        reduce="mean",
        lse=queries.lse,
    )


def _normalised(scores: jax.Array) -> jax.Array:
    """Scores as a distribution over the prompt's entries; near zero where all scores are."""
    return scores / jnp.maximum(scores.sum(-1, keepdims=True), _LITTLE)


def divergence(target: jax.Array, predicted: jax.Array) -> jax.Array:
    """KL(target || predicted) of two sets of scores [B, N, T], each normalised: [B, N]."""
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
def _predict(config, observer, layer, rows, seen):
    """Advances the lookahead rows by one layer: the rows, and their divergence from the target."""
    block, rope = observer
    p, lora, kind = layer
    context, target = seen
    rows, queries = observe_layer(
        p, rows, block, rope, kind, context=context, lora=lora, config=config
    )
    return rows, divergence(target, _attention_on_prompt(queries, context, kind, config))


def lookahead_losses(
    variants: Sequence[LookaheadModules],
    params: Params,
    prompts: Int[Array, "B T"],
    responses: Int[Array, "B Y"],
    *,
    config: ModelConfig,
    chunk: int | None = CHUNK,
) -> Float[Array, "V B"]:
    """The loss of V sets of modules on the same rows: float32 [V, B].

    Mean over layers and query heads of KL(target || predicted). `prompts` and `responses` are
    int32, right-padded with -1. The target is the attention of the response's queries under the
    full cache, the prediction that of the lookahead tokens. The prompt and the target are computed
    once, for all variants, which may differ in everything. Differentiable in `variants` alone. A
    row without a response has a loss of 0.
    """
    width = responses.shape[1]
    prompts, prompt = prompt_layout(prompts, 0, chunk, config)
    answered = (responses >= 0).sum(1, dtype=jnp.int32)
    steps = prompt.length[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    response = Block(
        x=embed(params, responses, config=config),
        positions=jnp.where(responses >= 0, steps, -1),
        rope_span=prompt.span,
    )
    observers = [
        observer_block(modules, prompt.length, prompt.span, dtype=response.x.dtype)
        for modules in variants
    ]
    rope, *ropes = (rope_tables(config, o.positions, prompt.span) for o in (response, *observers))
    observing = list(zip(observers, ropes, strict=True))

    def step(carry, inputs):
        x, buffers, response_rows, rows, losses = carry
        p, loras, kind = inputs
        x, buffers, _ = prompt_layer(p, x, buffers, prompt, kind, policy=None, config=config)
        # No slot bounds: a sweep with traced bounds could not be differentiated.
        context = Context(*buffers, prompt.positions[:, None])
        response_rows, queries = observe_layer(
            p, response_rows, response, rope, kind, context=context, lora=None, config=config
        )
        target = _attention_on_prompt(queries, context, kind, config)
        x, buffers, response_rows, context, target = jax.lax.stop_gradient(
            (x, buffers, response_rows, context, target)
        )
        predicted = [
            _predict(config, observer, (p, lora, kind), r, (context, target))
            for observer, lora, r in zip(observing, loras, rows, strict=True)
        ]
        losses = losses + jnp.stack([loss.mean(-1) for _, loss in predicted])
        return (x, buffers, response_rows, [rows for rows, _ in predicted], losses), None

    x = embed(params, prompts, config=config)
    carry = (
        x,
        layer_buffers(prompt, x.dtype, config),
        response.x,
        [observer.x for observer in observers],
        jnp.zeros((len(variants), prompts.shape[0]), jnp.float32),
    )
    loras = [observer.lora for observer in observers]
    (*_, losses), _ = scan_layers(step, carry, params["layers"], loras, layer_kinds(config))
    return jnp.where(answered[None] > 0, losses / config.num_layers, 0.0)


def lookahead_loss(
    modules: LookaheadModules,
    params: Params,
    prompts: Int[Array, "B T"],
    responses: Int[Array, "B Y"],
    *,
    config: ModelConfig,
    chunk: int | None = CHUNK,
) -> Float[Array, " B"]:
    """`lookahead_losses` of one set of modules: float32 [B]."""
    losses = lookahead_losses([modules], params, prompts, responses, config=config, chunk=chunk)
    return losses[0]
