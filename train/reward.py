"""Train a reward head for a model: from its hidden states, is the text right so far?

    lookahead train reward --model DIR --data STEPS.jsonl --run RUN
    lookahead generate --model DIR --strategy best_of_n --reward RUN ...

A line of STEPS.jsonl has a prompt, the steps of an answer, and for each step a label: 1 or 0, or
the probability that the answer is right up to its end. The head is a probe of the model's own
hidden states (Zhang et al. 2025, arXiv:2504.05419), and learns by the cross-entropy without their
weight for the rarer label, so that its output is a probability. The run is that of
train/head_run.py, on one device. B steps, D model.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.jit import program
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.reward_head import (
    RewardHead,
    init_reward_head,
    reward_logits,
    save_reward_head,
)
from lookahead_jax.train.head_run import HeadRunConfig, HeadTraining, train_head
from lookahead_jax.train.labelled_steps import StepBatch, StepData, open_steps, read_steps
from lookahead_jax.train.metrics import OnMetrics
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.step import StepMetrics, TrainState, next_state

_WARMUP = 0.03  # of the updates
_HELD_OUT = 1024  # most steps to measure with after each update


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(HeadRunConfig):
    """Train a reward head on labelled steps; the same command resumes."""

    data: tuple[Path, ...]
    """Files of JSON lines with "prompt", "steps" and "labels": a text, texts that follow it one
    after the other, and for each a number from 0 (wrong) to 1 (right up to its end)."""
    chat: bool = False
    """The prompts are users' messages: apply the model's chat template."""
    width: int = 0
    """Width of an inner layer of the head. 0: none, the head is linear."""
    epochs: int = 20
    """Passes over the steps. The model reads the texts only once."""
    batch: int = 64
    """Steps per update."""
    rate: float = 1e-3
    """Peak learning rate of Adam."""
    held_out: float = 0.1
    """Part of the texts that is not trained on; metrics.jsonl has the head's loss and accuracy on
    their steps."""
    batch_tokens: int = 16384
    """Most tokens of texts to read at a time, padding included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("width", self.width, least=0)
        for name in ("epochs", "batch_tokens"):
            check_integer(name, getattr(self, name), least=1)
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"rate={self.rate} must be a positive number")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be from 0 to below 1")


def reward_losses(
    head: RewardHead, hidden: Float[Array, "B D"], labels: Float[Array, " B"]
) -> Float[Array, " B"]:
    """The binary cross-entropy of each step, in nats."""
    scores = reward_logits(head, hidden)
    return jnp.logaddexp(0.0, scores) - labels * scores


@program(static_argnames=("optimizer", "total"), donate_argnames=("state",))
def reward_step(
    state: TrainState,
    batch: StepBatch,
    held_out: StepBatch | None = None,
    *,
    optimizer: OptimizerConfig,
    total: int,
) -> tuple[TrainState, StepMetrics]:
    """One update of `total` on the mean loss. The state is donated; `state.modules` is the head.

    It is skipped where loss or gradient is not finite. The metrics on steps that are held out are
    those after the update.
    """

    def loss_of(head: RewardHead) -> jax.Array:
        return reward_losses(head, batch.hidden, batch.labels).mean()

    loss, gradient = jax.value_and_grad(loss_of)(state.modules)
    state, metrics = next_state(state, make_optimizer(optimizer, total), loss, gradient)
    if held_out is not None:
        scores = reward_logits(state.modules, held_out.hidden)
        losses = reward_losses(state.modules, held_out.hidden, held_out.labels)
        right = (scores > 0) == (held_out.labels > 0.5)
        metrics |= {"held_out_loss": losses.mean(), "held_out_accuracy": right.mean()}
    return state, metrics


def train(config: RewardConfig, *, on_metrics: OnMetrics | None = None) -> RewardHead | None:
    """Trains to the end; None if a signal ended the run before. Otherwise as `train_head`."""

    def read(model: Model) -> StepData:
        texts = read_steps(config.data, model, chat=config.chat)
        if (most := config.max_prompt) is not None:
            texts = [text for text in texts if text.prompt <= most]
        return open_steps(
            texts, model, fingerprint(model.params), config.run / "states",
            tokens=config.batch_tokens, batch=config.batch, seed=config.seed,
            held_out=config.held_out,
        )  # fmt: skip

    def prepare(model: Model, data: StepData) -> HeadTraining:
        total = config.epochs * data.steps_per_epoch
        optimizer = OptimizerConfig(rate=config.rate, warmup=int(_WARMUP * total))
        held_out = None if data.trained.all() else data.held_out(_HELD_OUT)

        def step(state: TrainState, batch: StepBatch, _) -> tuple[TrainState, StepMetrics]:
            return reward_step(state, batch, held_out, optimizer=optimizer, total=total)

        return HeadTraining(
            total=total, optimizer=optimizer, identity={},
            start=partial(
                init_reward_head, hidden_size=model.config.hidden_size, width=config.width
            ),
            step=step, head=lambda weights: weights,
            save=partial(save_reward_head, params=model.params),
        )  # fmt: skip

    mesh = make_mesh(devices=jax.local_devices()[:1])
    return train_head(config, prepare, mesh=mesh, micro_batches=1, on_metrics=on_metrics, read=read)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 also when a signal has ended the run cleanly."""
    prog = "lookahead train reward"
    return run_command(lambda: tyro.cli(RewardConfig, args=args, prog=prog), train, prog=prog)


if __name__ == "__main__":
    end_process(main())
