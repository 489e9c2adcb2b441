"""Train the acceptance head of the drafter specdec for a model and its draft model.

    lookahead train data --model DIR --source FILE --out DATA
    lookahead train specdec --model DIR --draft-model SMALL --data DATA --run RUN
    lookahead generate --model DIR --drafter specdec --draft-model SMALL \\
        --drafter-arg head=RUN/head.safetensors ...

SpecDec++ (Huang et al. 2024, arXiv:2405.19715). Behind each prompt the draft model reads what it
drafts itself at every place of the target's response, with a few of the target's own tokens among
it. The head learns from its hidden states with which probability each drafted token is accepted.
The run is that of train/head_run.py.
Letters: A micro-batches, B rows of one, T prompt, Y response, S text of both, D draft model dim.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.drafters.draft_model import check_vocabulary
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import logits
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.acceptance_head import (
    AcceptanceHead,
    acceptance_logits,
    init_acceptance_head,
    save_acceptance_head,
)
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.head_run import HeadRunConfig, HeadTraining, load_model, train_head
from lookahead_jax.train.metrics import OnMetrics
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.step import StepMetrics, TrainState, next_state
from lookahead_jax.train.training_data import TrainingData

_WARMUP = 0.03  # of the steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptanceConfig(HeadRunConfig):
    """Train the acceptance head of the drafter specdec; the same command resumes."""

    draft_model: Path
    """Folder of the draft model, or `embedded` for the embedded model."""
    layers: int = 3
    """Residual blocks of the head."""
    weight: float = 6.0
    """Weight of rejected tokens in the loss; that of accepted ones is 1."""
    mixed: float = 0.15
    """Part of the response that the draft model reads as the target wrote it."""
    epochs: int = 3
    """Passes over the data."""
    batch: int = 32
    """Rows per update, over all devices."""
    micro_batches: int = 8
    """Passes per update; more passes take less memory."""
    rate: float = 5e-5
    """Peak learning rate of Adam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "epochs", "micro_batches"):
            check_integer(name, getattr(self, name), least=1)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be a positive number")
        if not 0 <= self.mixed < 1:
            raise ValueError(f"mixed={self.mixed} must be from 0 to below 1")


class Judged(NamedTuple):
    """Drafted tokens of the responses, and what the head learns of them."""

    hidden: jax.Array  # [B, Y, D] of the draft model after it has read them
    chance: jax.Array  # [B, Y] float32 probability that each is accepted
    counted: jax.Array  # [B, Y] bool drafted, and not the target's own token


def judged_drafts(
    target: Params,
    draft: Params,
    prompts: jax.Array,
    responses: jax.Array,
    key: jax.Array,
    *,
    config: ModelConfig,
    draft_config: ModelConfig,
    mixed: float,
) -> Judged:
    """Tokens that the draft model samples along the responses [B, Y] behind the prompts [B, T].

    Each is sampled behind the response as the target wrote it, and accepted with min(1, p / q).
    The draft model then reads them in a row, the target's token in a part `mixed` of the places.
    """
    (batch, width), rows = responses.shape, jnp.arange(len(responses))[:, None]
    places = (prompts >= 0).sum(1, dtype=jnp.int32)[:, None] + jnp.arange(width)[None]
    text = jnp.full((batch, prompts.shape[1] + width), -1, jnp.int32)
    text = text.at[:, : prompts.shape[1]].set(prompts).at[rows, places].set(responses)

    def next_tokens(params: Params, config: ModelConfig) -> jax.Array:
        hidden = hidden_states(params, text, config=config)[rows, places - 1]
        return jax.nn.log_softmax(logits(params, hidden, config=config), axis=-1)

    q = next_tokens(draft, draft_config)
    draw, mix = jax.random.split(key)
    drafted = jax.random.categorical(draw, q)

    def of_drafted(p: jax.Array) -> jax.Array:
        return jnp.take_along_axis(p, drafted[..., None], axis=-1)[..., 0]

    chance = jnp.exp(jnp.minimum(of_drafted(next_tokens(target, config)) - of_drafted(q), 0.0))
    own = jax.random.bernoulli(mix, mixed, responses.shape)
    read = jnp.where(responses < 0, -1, jnp.where(own, responses, drafted))
    text = text.at[rows, places].set(read)
    hidden = hidden_states(draft, text, config=draft_config)[rows, places]
    return Judged(hidden, chance, (responses >= 0) & ~own)


def head_loss(head: AcceptanceHead, judged: Judged, weight: float) -> jax.Array:
    """The binary cross-entropy of the counted tokens, rejections weighing `weight`: float32 []."""
    scores = jax.nn.log_softmax(acceptance_logits(head, judged.hidden), axis=-1)
    accepted = jnp.where(judged.counted, judged.chance, 0.0)
    rejected = jnp.where(judged.counted, weight * (1.0 - judged.chance), 0.0)
    total = accepted.sum() + rejected.sum()
    loss = -(rejected * scores[..., 0] + accepted * scores[..., 1]).sum()
    return loss / jnp.where(total > 0, total, 1.0)


_STATIC = ("config", "draft_config", "mixed", "weight", "optimizer", "total")


@program(static_argnames=_STATIC, donate_argnames=("state",))
def acceptance_step(
    target: Params,
    draft: Params,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    config: ModelConfig,
    draft_config: ModelConfig,
    mixed: float,
    weight: float,
    optimizer: OptimizerConfig,
    total: int,
) -> tuple[TrainState, StepMetrics]:
    """One update of `total` on the mean loss of the micro-batches. The state is donated.

    It is skipped where loss or gradient is not finite. `state.modules` is the head.
    """

    def add(so_far: Any, inputs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        rows, key = inputs
        judged = judged_drafts(
            target, draft, rows.prompts, rows.responses, key, config=config,
            draft_config=draft_config, mixed=mixed,
        )  # fmt: skip
        found = jax.value_and_grad(head_loss)(state.modules, judged, weight)
        return jax.tree.map(jnp.add, so_far, found), None

    nothing = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.modules)
    parts = len(batch.prompts)
    sums, _ = jax.lax.scan(add, nothing, (batch, jax.random.split(key, parts)))
    loss, gradient = jax.tree.map(lambda a: a / parts, sums)
    return next_state(state, make_optimizer(optimizer, total), loss, gradient)


def train(
    config: AcceptanceConfig, *, on_metrics: OnMetrics | None = None
) -> AcceptanceHead | None:
    """Trains to the end; None if a signal ended the run before. Otherwise as `train_head`."""
    mesh = make_mesh()

    def prepare(target: Model, data: TrainingData) -> HeadTraining:
        draft = load_model(config.draft_model, dtype=config.dtype, mesh=mesh)
        check_vocabulary(draft.config, target.config)
        total, width = config.epochs * data.steps_per_epoch, draft.config.hidden_size
        optimizer = OptimizerConfig(rate=config.rate, warmup=int(_WARMUP * total))
        step = partial(
            acceptance_step, target.params, draft.params, config=target.config,
            draft_config=draft.config, mixed=config.mixed, weight=config.weight,
            optimizer=optimizer, total=total,
        )  # fmt: skip
        return HeadTraining(
            total=total, optimizer=optimizer, identity={"draft": fingerprint(draft.params)},
            start=partial(init_acceptance_head, hidden_size=width, layers=config.layers),
            step=step, head=lambda weights: weights,
            save=partial(save_acceptance_head, params=draft.params),
        )  # fmt: skip

    return train_head(
        config, prepare, mesh=mesh, micro_batches=config.micro_batches, on_metrics=on_metrics
    )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train specdec"
    return run_command(lambda: tyro.cli(AcceptanceConfig, args=args, prog=prog), train, prog=prog)


if __name__ == "__main__":
    end_process(main())
