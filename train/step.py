"""One training step of the lookahead modules, jitted over a mesh with donated state.

Letters: A micro-batches, B rows of one, T prompt, Y response.
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
from lookahead_jax.model.params import Params, WeightType
from lookahead_jax.model.sharding import param_shardings, sharding
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.train.objective import lookahead_losses

StepMetrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """The state that a step updates; the base model is not part of it."""

    modules: LookaheadModules  # float32
    optimizer: optax.OptState
    skipped: jax.Array  # [] int32 steps without an update so far: loss or gradient not finite
    skipped_in_a_row: jax.Array  # [] int32


@struct.dataclass
class Batch:
    """Token rows of one step, right-padded with -1; rows without a response are ignored."""

    prompts: jax.Array  # [A, B, T] int32
    responses: jax.Array  # [A, B, Y] int32


def init_state(modules: LookaheadModules, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    tree: Any = modules  # optax declares arrays, and takes any tree of them
    return TrainState(modules, optimizer.init(tree), zero, jnp.zeros_like(zero))


def train_step(
    params: Params,
    state: TrainState,
    batch: Batch,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    chunk: int | None = CHUNK,
) -> tuple[TrainState, StepMetrics]:
    """The state after one update on the mean loss of the rows that have a response.

    Gradients are summed over the micro-batches. Where the loss or a gradient is not finite, the
    modules and the optimizer stay as they are and the step counts as skipped.
    """
    everything = jnp.ones((1, *batch.prompts.shape[:2]), bool)
    (state,), (metrics,) = variants_step(
        params, (state,), batch, everything, config=config, optimizers=(optimizer,), chunk=chunk
    )
    return state, metrics


def variants_step(
    params: Params,
    states: Sequence[TrainState],
    batch: Batch,
    used: jax.Array,
    *,
    config: ModelConfig,
    optimizers: Sequence[optax.GradientTransformation],
    chunk: int | None = CHUNK,
) -> tuple[tuple[TrainState, ...], tuple[StepMetrics, ...]]:
    """`train_step` of V independent runs on one batch, whose prompts are read once for all.

    Run v learns from the rows of `used` [V, A, B] bool alone.
    """
    learned = used & (batch.responses >= 0).any(-1)[None]
    rows = learned.sum((1, 2), dtype=jnp.int32)
    count = jnp.maximum(rows, 1).astype(jnp.float32)
    weights = learned.astype(jnp.float32) / count[:, None, None]

    def mean_losses(variants: list[LookaheadModules], part: Batch, weights: jax.Array):
        losses = lookahead_losses(
            variants, params, part.prompts, part.responses, config=config, chunk=chunk
        )
        losses = (losses * weights).sum(-1)
        return losses.sum(), losses  # no run's loss depends on another's modules

    def accumulate(carry, inputs):
        part, weights = inputs
        (_, losses), gradients = gradient_of(variants, part, weights)
        return jax.tree.map(jnp.add, carry, (losses, gradients)), None

    gradient_of = jax.value_and_grad(mean_losses, has_aux=True)
    variants = [state.modules for state in states]
    nothing = (jnp.zeros(len(states), jnp.float32), jax.tree.map(jnp.zeros_like, variants))
    (losses, gradients), _ = jax.lax.scan(accumulate, nothing, (batch, weights.swapaxes(0, 1)))
    sizes = {
        "prompt_tokens": (batch.prompts >= 0).sum(dtype=jnp.int32),
        "response_tokens": (batch.responses >= 0).sum(dtype=jnp.int32),
    }
    updated, metrics = [], []
    for state, optimizer, loss, gradient, count in zip(
        states, optimizers, losses, gradients, rows, strict=True
    ):
        norm = optax.tree.norm(gradient)
        state = _update(state, optimizer, gradient, jnp.isfinite(loss) & jnp.isfinite(norm))
        updated.append(state)
        metrics.append(
            {"loss": loss, "grad_norm": norm, "rows": count}
            | sizes
            | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        )
    return tuple(updated), tuple(metrics)


def _update(
    state: TrainState, optimizer: optax.GradientTransformation, gradient: Any, finite: jax.Array
) -> TrainState:
    """The state after an update, or after a skipped one."""
    trained: Any = state.modules
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, moments = optimizer.update(gradient, state.optimizer, trained)
    updated = (optax.apply_updates(trained, updates), moments)
    modules, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (state.modules, state.optimizer)
    )
    bad = (~finite).astype(jnp.int32)
    return TrainState(
        modules=modules,
        optimizer=moments,
        skipped=state.skipped + bad,
        skipped_in_a_row=bad * (state.skipped_in_a_row + 1),
    )


def check_batch(batch: int, micro_batches: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets as many rows of each micro-batch."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if min(batch, micro_batches) < 1 or batch % (devices * micro_batches):
        raise ValueError(
            f"a batch of {batch} cannot be split into {micro_batches} micro-batches on {devices} "
            "devices"
        )


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of each micro-batch are split over the data axes."""
    return sharding((None, "batch"), mesh)


def compile_step(
    mesh: Mesh,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    chunk: int | None = CHUNK,
    weights: WeightType | None = None,
) -> Callable[[Params, TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """`train_step` jitted for a mesh: weights sharded, state replicated and donated.

    `.lower` accepts abstract shapes, so that a step can be compiled for absent chips.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def step(params: Params, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return train_step(params, state, batch, config=config, optimizer=optimizer, chunk=chunk)

    return jax.jit(
        step,
        in_shardings=(
            param_shardings(config, mesh, weights),
            replicated,
            microbatch_sharding(mesh),
        ),
        out_shardings=replicated,
        donate_argnums=1,
        compiler_options=compiler_options(),
    )
