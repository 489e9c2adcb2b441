"""One training step of the embedded base model: its optimizer, its losses, the update."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params, unstack
from lookahead_jax.train.embedded.base_config import BaseConfig
from lookahead_jax.train.embedded.mixture import TrainingRows


def optimizer(config: BaseConfig) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the rest; warm-up, constant, linear decay to zero."""
    total = sum(config.steps)

    def schedule(step):
        left = (total - step) / max(1.0, config.decay * total)
        return jnp.minimum(jnp.minimum((step + 1) / config.warmup, 1.0), left)

    matrices: dict[str, Any] = {name: MuonDimensionNumbers(1, 2) for name in ("gate", "up", "down")}
    matrices |= {name: MuonDimensionNumbers(1, (2, 3)) for name in ("q", "k", "v")}
    matrices["o"] = MuonDimensionNumbers((1, 2), 3)

    def dimensions(params: Params) -> Any:
        return {
            name: {n: matrices.get(n) for n in leaf} if name == "layers" else None
            for name, leaf in params.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            lambda step: config.muon_rate * schedule(step),
            adam_learning_rate=lambda step: config.adam_rate * schedule(step),
            adam_b1=0.9,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=cast(Any, dimensions),
        ),
    )


def token_losses(params: Params, rows: TrainingRows, *, model: ModelConfig):
    """-log p of the token after each picked position, and whether it is the likeliest: [B, Q]."""
    tokens, positions, picks, _ = rows
    x = embed(params, tokens[:, :-1], config=model)
    block = Block(x=x, positions=positions, rope_span=positions[:, -1] + 1)
    hidden = forward(params, block, None, config=model).hidden
    hidden = jnp.take_along_axis(hidden, picks[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, picks + 1, axis=1)
    scores = logits(params, hidden, config=model)
    nll = (
        jax.nn.logsumexp(scores, axis=-1)
        - jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    )
    return nll, scores.argmax(-1) == targets


def mean_loss(params: Params, rows: TrainingRows, *, model: ModelConfig):
    """Mean loss over micro-batches [n, B, ...], the share of right tokens, and the gradient."""
    total = jnp.maximum(rows.weights.sum(), 1.0)

    def micro(params, part):
        nll, right = token_losses(unstack(params), part, model=model)
        return (nll * part.weights).sum() / total, (right * part.weights).sum() / total

    def step(carry, part):
        (loss, right), grads = jax.value_and_grad(micro, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, carry, (loss, right, grads)), None

    zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(step, zero, rows)[0]


@program(static_argnames=("config", "model"), donate_argnames=("params", "state"))
def base_step(
    params: Params,
    state: optax.OptState,
    text: TrainingRows,
    tasks: TrainingRows,
    *,
    config: BaseConfig,
    model: ModelConfig,
) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
    """One optimizer step on text and task micro-batches: parameters, optimizer state, metrics."""
    text_loss, _, text_grads = mean_loss(params, text, model=model)
    task_loss, right, task_grads = mean_loss(params, tasks, model=model)
    w = config.task_weight
    grads = jax.tree.map(lambda a, b: (1 - w) * a + w * b, text_grads, task_grads)
    norm = optax.global_norm(grads)
    updates, state = optimizer(config).update(grads, state, params)
    metrics = {
        "text_loss": text_loss,
        "task_loss": task_loss,
        "task_right": right,
        "grad_norm": norm,
    }
    updated: Any = optax.apply_updates(params, updates)
    return updated, state, metrics
