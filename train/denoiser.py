"""Train the head of the drafter `denoiser` for a model.

    lookahead train data --model DIR --source FILE ... --out DATA
    lookahead train denoiser --model DIR --data DATA --run RUN
    lookahead generate --model DIR --drafter denoiser --drafter-arg head=RUN/head.safetensors ...

The base model reads prompts and responses and is not changed; its own responses train best
(train/denoising.py). The run is that of train/head_run.py, on one device.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.compute
import tyro

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.integers import check_integer
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.denoiser import (
    DenoiserHead,
    DenoiserHeadConfig,
    init_denoiser_head,
)
from lookahead_jax.modules.denoiser_files import save_denoiser_head
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.checkpoints import digests
from lookahead_jax.train.denoising import denoiser_step, texts_of
from lookahead_jax.train.head_run import HeadRunConfig, HeadTraining, train_head
from lookahead_jax.train.metrics import OnMetrics
from lookahead_jax.train.optimizer import OptimizerConfig
from lookahead_jax.train.step import StepMetrics, TrainState
from lookahead_jax.train.training_data import PARTS, TrainingData

SIZES = DenoiserHeadConfig(tokens=8, width=512, heads=8, layers=1, vocabulary=None)
ADAM = OptimizerConfig(rate=1e-3, warmup=50, clip=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig(HeadRunConfig):
    """Train the head of the drafter denoiser for a model; the same command resumes."""

    head: DenoiserHeadConfig = SIZES
    optimizer: OptimizerConfig = ADAM
    steps: int = 2000
    """Updates of the whole run, over which the learning rate decays."""
    batch: int = 4
    """Rows per update."""
    places: int = 32
    """Places of each response to learn from, per update."""
    decay: float = 0.8
    """Weight of a token of the block relative to the one before it: a token counts only where all
    before it are accepted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("places", self.places, least=1)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay} must be above 0 and at most 1")


def frequent_tokens(data: TrainingData, count: int, vocab_size: int) -> np.ndarray:
    """The `count` most frequent tokens of prompts and responses, ascending int32 [count].

    Of equally frequent ones the lower ids, so that those of a byte-pair encoding that do not occur
    are short pieces. Raises ValueError for more tokens than the model has.
    """
    if count > vocab_size:
        raise ValueError(f"head.vocabulary {count} exceeds the model's {vocab_size} tokens")
    table = data.dataset.data
    columns = [
        pyarrow.compute.call_function("list_flatten", [table.column(name)]).to_numpy()
        for name in PARTS
    ]
    often = np.bincount(np.concatenate(columns), minlength=vocab_size)
    return np.sort(np.argsort(-often, kind="stable")[:count]).astype(np.int32)


def train(config: DenoiserConfig, *, on_metrics: OnMetrics | None = None) -> DenoiserHead | None:
    """Trains to the end; None if a signal ended the run before. Otherwise as `train_head`."""

    def prepare(model: Model, data: TrainingData) -> HeadTraining:
        vocabulary = None
        if (count := config.head.vocabulary) is not None:
            vocabulary = jnp.asarray(frequent_tokens(data, count, model.config.vocab_size))

        def start(key: jax.Array) -> Params:
            return init_denoiser_head(key, config.head, model.config.hidden_size)

        def head(weights: Params) -> DenoiserHead:
            return DenoiserHead(weights, vocabulary, config.head)

        def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, StepMetrics]:
            return denoiser_step(
                model.params, vocabulary, state, texts_of(batch), key, sizes=config.head,
                config=model.config, optimizer=config.optimizer, total=config.steps,
                places=config.places, decay=config.decay,
            )  # fmt: skip

        return HeadTraining(
            total=config.steps, optimizer=config.optimizer,
            identity={"vocabulary": digests(vocabulary)}, start=start, step=step, head=head,
            save=partial(save_denoiser_head, params=model.params),
        )  # fmt: skip

    mesh = make_mesh(devices=jax.local_devices()[:1])
    return train_head(config, prepare, mesh=mesh, micro_batches=1, on_metrics=on_metrics)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 also when a signal has ended the run cleanly."""
    prog = "lookahead train denoiser"
    return run_command(lambda: tyro.cli(DenoiserConfig, args=args, prog=prog), train, prog=prog)


if __name__ == "__main__":
    end_process(main())
