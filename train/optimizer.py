"""The optimizer of the lookahead modules: Adam, linear warm-up, cosine decay, optional clipping."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its learning rate."""

    rate: float
    """Peak learning rate."""
    warmup: int
    """Steps of linear warm-up; 0 starts at the peak."""
    floor: float = 0.0
    """Final learning rate as a fraction of the peak."""
    b1: float = 0.9
    """Decay of Adam's mean."""
    b2: float = 0.999
    """Decay of Adam's mean of squares."""
    eps: float = 1e-8
    """Added to the root of the mean of squares."""
    clip: float | None = None
    """Largest global norm of the gradient; None disables clipping."""


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule of a run of `steps`: number of updates so far -> learning rate of the next."""
    if not config.warmup:
        return optax.cosine_decay_schedule(config.rate, steps, config.floor)
    return optax.warmup_cosine_decay_schedule(
        config.rate / config.warmup, config.rate, config.warmup, steps, config.rate * config.floor
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`. Raises ValueError unless the warm-up is shorter."""
    if not 0 <= config.warmup < steps:
        raise ValueError(f"a warm-up of {config.warmup} steps does not fit a run of {steps} steps")
    adam = optax.adam(learning_rate(config, steps), config.b1, config.b2, config.eps)
    return (
        adam if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), adam)
    )
