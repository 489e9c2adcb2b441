"""A run that trains a small head beside a model: its folder, its data, its steps, and how it ends.

The models are not changed. RUN receives checkpoints/, metrics.jsonl and, at every checkpoint,
head.safetensors. The same command resumes a run, and Ctrl-C or SIGTERM ends it in order.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.host.files import make_folder
from lookahead_jax.host.integers import check_integer
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.modules.head_files import HEAD_FILE
from lookahead_jax.train.batches import microbatch_sharding
from lookahead_jax.train.checkpoints import Checkpoints, digests
from lookahead_jax.train.metrics import MetricsLog, OnMetrics
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.progress import say, steps
from lookahead_jax.train.step import StepMetrics, TrainState, check_batch, init_state
from lookahead_jax.train.stopping import stop_requests
from lookahead_jax.train.training_data import open_data

_PATIENCE = 50  # steps in a row without a finite loss
_FREE = (  # settings that may change when a run goes on
    "model", "draft_model", "data", "run", "dtype", "micro_batches", "save_every", "log_every",
    "batch_tokens",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadRunConfig:
    """What the commands that train a head share."""

    data: tuple[Path, ...]
    """Folders that `lookahead train data` wrote for the model; their rows are pooled."""
    run: Path
    """Folder of the run, made if it does not exist. An existing run is resumed."""
    model: Path | None = None
    """Folder of the model that the head is for. Default: the embedded model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the models' weights; None: that of the checkpoints."""
    batch: int
    """Rows per update, over all devices."""
    max_prompt: int | None = None
    """Longest prompt in tokens; rows with a longer one are skipped. None: no limit."""
    seed: int = 0
    """Seed of the first head, of the order of the data, and of what the steps draw."""
    save_every: int = 100
    """Steps between checkpoints; RUN/head.safetensors is written with each."""
    log_every: int = 10
    """Steps between writes of metrics.jsonl, which has a line for every step."""

    def __post_init__(self) -> None:
        for name in ("batch", "save_every", "log_every"):
            check_integer(name, getattr(self, name), least=1)


class HeadTraining(NamedTuple):
    """What one kind of head brings to its run."""

    total: int  # steps
    optimizer: OptimizerConfig
    identity: dict[str, Any]  # of the run, beside settings, model and data: JSON
    start: Callable[[jax.Array], Any]  # key -> weights before training, float32
    step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, StepMetrics]]
    head: Callable[[Any], Any]  # weights -> the head
    save: Callable[[Path, Any], None]  # writes the head


def load_model(folder: Path | None, *, dtype: str | None, mesh: Mesh) -> Model:
    """The model in a folder; the embedded one for None, and for `embedded` unless that exists."""
    say(f"loading {folder or 'the embedded model'}")
    if folder is None or (folder == Path("embedded") and not folder.exists()):
        folder = EMBEDDED_MODEL
    return load(folder, dtype=dtype, mesh=mesh)


def train_head(
    config: HeadRunConfig,
    prepare: Callable[[Model, Any], HeadTraining],
    *,
    mesh: Mesh,
    micro_batches: int,
    on_metrics: OnMetrics | None,
    read: Callable[[Model], Any] | None = None,
) -> Any:
    """Trains from the newest checkpoint to the end: the head, or None if a signal came before.

    `read` opens data of another kind than `TrainingData`, with `batch_of` and `content` as that
    has. The head so far is written at every checkpoint. `on_metrics` receives every line of
    metrics.jsonl. Raises ValueError for a configuration that does not fit the model, the data, the
    devices or an existing run, FloatingPointError when too many steps in a row are skipped,
    BlockingIOError if another process writes the run.
    """
    check_batch(config.batch, micro_batches, mesh)
    make_folder(config.run)
    with folder_lock(config.run), jax.set_mesh(mesh):
        model = load_model(config.model, dtype=config.dtype, mesh=mesh)
        base = fingerprint(model.params)
        if read is not None:
            data = read(model)
        else:
            data = open_data(
                config.data, batch=config.batch, seed=config.seed, base_fingerprint=base,
                max_prompt=config.max_prompt,
            )  # fmt: skip
        training = prepare(model, data)
        identity = _settings(config) | training.identity
        identity |= {"base": base, "data": digests(data.content), "total": training.total}
        with Checkpoints(config.run / "checkpoints", keep=2, identity=identity) as checkpoints:

            def batch_of(step: int) -> Any:
                return data.batch_of(step, micro_batches, microbatch_sharding(mesh))

            return _run_steps(
                config, training, batch_of, checkpoints, mesh=mesh, on_metrics=on_metrics
            )


def _settings(config: HeadRunConfig) -> dict[str, Any]:
    """The settings that may not change when the run goes on, as JSON."""
    described = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {name: value for name, value in described.items() if name not in _FREE}


def _start(training: HeadTraining, key: jax.Array, mesh: Mesh) -> TrainState:
    """The state before the first step, on every device."""
    optimizer = make_optimizer(training.optimizer, training.total)

    def init(key: jax.Array) -> TrainState:
        return init_state(training.start(key), optimizer)

    return jax.jit(init, out_shardings=NamedSharding(mesh, PartitionSpec()))(key)


def _run_steps(
    config: HeadRunConfig,
    training: HeadTraining,
    batch_of: Callable[[int], Any],
    checkpoints: Checkpoints,
    *,
    mesh: Mesh,
    on_metrics: OnMetrics | None,
) -> Any:
    """`train_head` in an open run."""
    path, total, root = config.run / HEAD_FILE, training.total, jax.random.key(config.seed)
    state = _start(training, root, mesh)
    first, state = checkpoints.restore(state) or (0, state)
    metrics = MetricsLog(
        config.run / "metrics.jsonl", first, every=config.log_every, patience=_PATIENCE,
        on_metrics=on_metrics,
    )  # fmt: skip

    def export() -> None:
        training.save(path, training.head(state.modules))

    if first:  # a run that was killed may have a checkpoint and not its head
        export()
    with stop_requests() as stop_requested:
        for step in steps(first, total):
            state, values = training.step(state, batch_of(step), jax.random.fold_in(root, step))
            metrics.add(step, values)
            done, stop = step + 1, stop_requested(step)
            if stop or done == total or done % config.save_every == 0:
                metrics.flush()
                checkpoints.save(done, state)
                export()
            if stop and done < total:
                say(
                    f"stopped after step {done} of {total}; {path} holds the head so far, and the "
                    "same command goes on"
                )
                return None
    say(f"{path}: the head after {total} steps")
    return training.head(state.modules)
