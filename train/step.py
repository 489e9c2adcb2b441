"""One training step of the lookahead modules, jitted over a mesh with donated state.

Letters: A micro-batches, B rows of one, V independent runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import compiler_options
from lookahead_jax.model.parameter_specs import WeightType
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import param_shardings
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.train.batches import AnyBatch, forward_sharding, microbatch_sharding
from lookahead_jax.train.loss import PAPER, LossConfig

StepMetrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """The state that a step updates; the base model is not part of it."""

    modules: Any  # float32: LookaheadModules, or another pytree that is trained in their way
    optimizer: optax.OptState
    skipped: jax.Array  # [] int32 steps without an update so far: loss or gradient not finite
    skipped_in_a_row: jax.Array  # [] int32


def init_state(modules: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(modules, optimizer.init(modules), zero, jnp.zeros_like(zero))


def train_step(
    params: Params,
    state: TrainState,
    batch: AnyBatch,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    loss: LossConfig = PAPER,
    chunk: int | None = CHUNK,
) -> tuple[TrainState, StepMetrics]:
    """The state after one update on the mean loss of the rows that have a response.

    Gradients are summed over the micro-batches. Where the loss or a gradient is not finite, the
    modules and the optimizer stay as they are and the step counts as skipped.
    """
    everything = jnp.ones((1, *batch.length.shape), bool)
    (state,), (metrics,) = variants_step(
        params, (state,), batch, everything,
        config=config, optimizers=(optimizer,), losses=(loss,), chunk=chunk,
    )  # fmt: skip
    return state, metrics


def variants_step(
    params: Params,
    states: Sequence[TrainState],
    batch: AnyBatch,
    used: jax.Array,
    *,
    config: ModelConfig,
    optimizers: Sequence[optax.GradientTransformation],
    losses: Sequence[LossConfig] | None = None,
    chunk: int | None = CHUNK,
) -> tuple[tuple[TrainState, ...], tuple[StepMetrics, ...]]:
    """`train_step` of V independent runs on one batch, whose prompts are read once for all.

    Run v learns from the rows of `used` [V, A, B] bool alone. `losses` has the loss of each, by
    default the paper's.
    """
    learned = used & (batch.answered > 0)[None]
    rows = learned.sum((1, 2), dtype=jnp.int32)
    count = jnp.maximum(rows, 1).astype(jnp.float32)
    weights = learned.astype(jnp.float32) / count[:, None, None]

    losses = [PAPER] * len(states) if losses is None else losses

    def mean_losses(variants: list[LookaheadModules], part: AnyBatch, weights: jax.Array):
        parts = part.losses(variants, params, config=config, losses=losses, chunk=chunk)
        values = jnp.stack([parts.total(losses), *parts])
        values = (values * weights[None]).sum(-1)
        return values[0].sum(), values  # no run's loss depends on another's modules

    def accumulate(carry, inputs):
        part, weights = inputs
        (_, values), gradients = gradient_of(variants, part, weights)
        return jax.tree.map(jnp.add, carry, (values, gradients)), None

    gradient_of = jax.value_and_grad(mean_losses, has_aux=True)
    variants = [state.modules for state in states]
    nothing = (jnp.zeros((3, len(states)), jnp.float32), jax.tree.map(jnp.zeros_like, variants))
    (values, gradients), _ = jax.lax.scan(accumulate, nothing, (batch, weights.swapaxes(0, 1)))
    sizes = {
        "prompt_tokens": batch.length.sum(dtype=jnp.int32),
        "response_tokens": batch.answered.sum(dtype=jnp.int32),
    }
    updated, metrics = [], []
    for state, optimizer, loss, (total, importance, memory), gradient, count in zip(
        states, optimizers, losses, values.T, gradients, rows, strict=True
    ):
        state, changed = next_state(state, optimizer, total, gradient)
        updated.append(state)
        parts = {"importance_loss": importance, "memory_loss": memory} if loss.memory else {}
        metrics.append(changed | parts | {"rows": count} | sizes)
    return tuple(updated), tuple(metrics)


def next_state(
    state: TrainState, optimizer: optax.GradientTransformation, loss: jax.Array, gradient: Any
) -> tuple[TrainState, StepMetrics]:
    """The state after an update, or after a skipped one: loss or gradient not finite."""
    norm, trained = optax.tree.norm(gradient), state.modules
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, moments = optimizer.update(gradient, state.optimizer, trained)
    updated = (optax.apply_updates(trained, updates), moments)
    modules, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (state.modules, state.optimizer)
    )
    bad = (~finite).astype(jnp.int32)
    state = TrainState(
        modules=modules,
        optimizer=moments,
        skipped=state.skipped + bad,
        skipped_in_a_row=bad * (state.skipped_in_a_row + 1),
    )
    skipped = {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    return state, {"loss": loss, "grad_norm": norm} | skipped


def check_batch(batch: int, micro_batches: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets as many rows of each micro-batch."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if min(batch, micro_batches) < 1 or batch % (devices * micro_batches):
        raise ValueError(
            f"a batch of {batch} cannot be split into {micro_batches} micro-batches on {devices} "
            "devices"
        )


def compile_step(
    mesh: Mesh,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    loss: LossConfig = PAPER,
    chunk: int | None = CHUNK,
    weights: WeightType | None = None,
    forwards: bool = False,
) -> Callable[[Params, TrainState, AnyBatch], tuple[TrainState, StepMetrics]]:
    """`train_step` jitted for a mesh: weights sharded, state replicated and donated.

    With `forwards` its batches are ForwardBatches. `.lower` accepts abstract shapes, so that a
    step can be compiled for absent chips.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def step(params: Params, state: TrainState, batch: AnyBatch) -> tuple[TrainState, StepMetrics]:
        return train_step(
            params, state, batch, config=config, optimizer=optimizer, loss=loss, chunk=chunk
        )

    return jax.jit(
        step,
        in_shardings=(
            param_shardings(config, mesh, weights),
            replicated,
            forward_sharding(mesh) if forwards else microbatch_sharding(mesh),
        ),
        out_shardings=replicated,
        donate_argnums=1,
        compiler_options=compiler_options(),
    )
