"""Train lookahead modules for a model.

    lookahead train lookahead CONFIG --model DIR --data DIR --run DIR [--steps N ...]

CONFIG is a JSON file, or the name of one in train/configs (`published`); any field can be set on
the command line. The same command resumes a run. On several hosts, start it on each of them; a
SIGTERM makes all of them save the same step and exit, and on one host Ctrl-C does. RUN receives
config.json (every field as it was used), metrics.jsonl, checkpoints/ and, at every checkpoint,
modules/. `python -m lookahead_jax.train.lookahead` is the same command.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lookahead_jax.checkpoints.hf_files import read_json
from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.config_files import cli_with_file
from lookahead_jax.host.files import atomic_write, make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.host.run_folder import SETTINGS
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.parameter_specs import WeightType
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import (
    LookaheadConfig,
    LookaheadModules,
    init_modules,
    with_targets_of,
)
from lookahead_jax.modules.files import load_modules, save_modules
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.train.batches import microbatch_sharding
from lookahead_jax.train.checkpoints import Checkpoints
from lookahead_jax.train.forwards import ForwardStore
from lookahead_jax.train.loss import PAPER, LossConfig, check_loss
from lookahead_jax.train.metrics import MetricsLog, OnMetrics
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.progress import say, steps
from lookahead_jax.train.step import TrainState, check_batch, compile_step, init_state
from lookahead_jax.train.stopping import stop_requests
from lookahead_jax.train.training_data import TrainingData, open_data

_PRESETS = Path(__file__).parent / "configs"
_IDENTITY = ("modules", "optimizer", "steps", "batch", "seed", "max_prompt")  # of a run to resume


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are arranged."""

    data: int | None = None
    """Ways to split the batch; None: all devices that the others leave."""
    fsdp: int = 1
    """Ways to split both the batch and the model dimension of the weights."""
    expert: int = 1
    """Ways to split the experts of a mixture, and nothing else."""
    tensor: int = 1
    """Ways to split heads, MLP and vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train lookahead modules for a model; the same command resumes."""

    model: Path
    """Folder of the base model, which is not changed."""
    data: tuple[Path, ...]
    """Folders written by `lookahead train data`; their rows are pooled."""
    run: Path
    """Folder of the run, made if it does not exist. An existing run is resumed."""
    modules: LookaheadConfig
    optimizer: OptimizerConfig
    steps: int
    """Updates of the whole run, over which the learning rate decays."""
    batch: int
    """Rows per update, over all devices."""
    micro_batches: int = 1
    """Passes per update (gradient accumulation); more passes take less memory."""
    seed: int = 0
    """Seed of the initial modules and of the order of the data."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the base weights; None: that of the checkpoint."""
    weights: WeightType | None = None
    """int8: the base's matrices in eight bits, with one scale per output channel."""
    loss: LossConfig = PAPER
    start: Path | None = None
    """Folder of modules of the same sizes to start from, with or without a memory; None: random
    ones."""
    forwards: Path | None = None
    """Cache folder for the base model's keys, values and targets of each row: later epochs, and
    other runs on the same rows, run the lookahead tokens alone. None: nothing is cached."""
    shards: int | None = None
    """Use the first N shards of one folder, which may be unfinished: the run starts on those that
    are there, and its first epoch visits them in order. None: all of finished data."""
    hide_question: float = 0.0
    """Share of the rows with a `question` in which the lookahead tokens do not see it: they follow
    the text before it, and question and answer together are the response. For prompts that are cut
    before anyone asks about them."""
    max_prompt: int | None = None
    """Longest prompt in tokens; rows with a longer one are skipped. None: no limit."""
    chunk: int | None = CHUNK
    """Prompt tokens that a layer processes at a time; None: chosen for the platform."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    save_every: int = 200
    """Steps between checkpoints; RUN/modules is written with each."""
    keep: int = 3
    """Number of checkpoints to keep."""
    log_every: int = 10
    """Steps between writes of metrics.jsonl, which has a line for every step."""
    stop_after_skipped: int = 50
    """Stop with an error after this many consecutive steps with a non-finite loss or gradient."""
    profile: tuple[int, int] | None = None
    """First and last step of a jax.profiler trace, written to RUN/profile."""


class RowsMissing(ValueError):
    """The data of the next step are still to be made."""

    def __init__(self, step: int, config: TrainConfig):
        super().__init__(
            f"{config.data[0]} has rows for {step} of {config.steps} steps so far: make more of "
            "them; then the same command goes on"
        )


def parse_config(args: Sequence[str]) -> TrainConfig:
    """CONFIG and overrides -> the run's configuration.

    Raises ValueError if CONFIG does not exist or does not fit, UsageError for wrong options.
    """
    return cli_with_file(TrainConfig, args, _PRESETS, "lookahead train lookahead")


def train(config: TrainConfig, *, on_metrics: OnMetrics | None = None) -> LookaheadModules | None:
    """Trains to the end and exports the modules; None if a signal ended the run before.

    The modules are exported at every checkpoint, also when the run ends early. `on_metrics`
    receives every line of metrics.jsonl as a dict, on the first process. Raises RowsMissing where
    the next step's shards are still to be made, ValueError for a configuration that does not fit
    model, data or devices, FloatingPointError when too many steps in a row are skipped,
    BlockingIOError if another process writes the run.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_batch(config.batch, config.micro_batches, mesh)
    for name in ("save_every", "chunk"):
        if (size := getattr(config, name)) is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    check_loss(config.modules, config.loss)
    make_folder(config.run)
    # Only the first process writes logs and checkpoints; the folder may be on a shared disk.
    lock = folder_lock(config.run) if jax.process_index() == 0 else contextlib.nullcontext()
    with lock:
        return _train(config, mesh, on_metrics)


def _train(
    config: TrainConfig, mesh: Mesh, on_metrics: OnMetrics | None
) -> LookaheadModules | None:
    """`train` in a folder that no other process writes."""
    say(f"loading {config.model}")
    model = load(config.model, dtype=config.dtype, mesh=mesh, weights=config.weights)
    base = fingerprint(model.params)
    data = open_data(
        config.data, batch=config.batch, seed=config.seed, base_fingerprint=base,
        max_prompt=config.max_prompt, shards=config.shards, hide_question=config.hide_question,
    )  # fmt: skip
    described = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    identity = {name: described[name] for name in _IDENTITY} | {"base": base}
    identity |= {"modules": json.loads(json.dumps(config.modules.described))}
    if config.start is not None:
        identity |= {"start": described["start"]}
    if config.shards is not None:  # then the data's settings and their number name the rows
        rows = read_json(config.data[0], SETTINGS)
        identity |= {"shards": config.shards, "data": rows}
    # The defaults are left out: so were they when these fields did not exist.
    if config.loss != PAPER:
        identity |= {"loss": json.loads(json.dumps(config.loss.described))}
    if config.hide_question:
        identity |= {"hide_question": config.hide_question}
    if config.forwards is not None:  # float16 keys and values
        identity |= {"forwards": True}
    with (
        jax.set_mesh(mesh),
        Checkpoints(config.run / "checkpoints", keep=config.keep, identity=identity) as checkpoints,
    ):
        state = _run_steps(
            config,
            model,
            data,
            mesh=mesh,
            checkpoints=checkpoints,
            described=described,
            on_metrics=on_metrics,
            base=base,
        )
    return None if state is None else state.modules


def _run_steps(
    config: TrainConfig,
    model: Model,
    data: TrainingData,
    *,
    mesh: Mesh,
    checkpoints: Checkpoints,
    described: dict[str, Any],
    on_metrics: OnMetrics | None,
    base: str,
) -> TrainState | None:
    """Trains from the newest checkpoint to the last step; None if a signal came before.

    Setting up and the loop stand together because saving, stopping and tracing share their state.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    step_fn = compile_step(
        mesh, config=model.config, optimizer=optimizer, loss=config.loss, chunk=config.chunk,
        weights=config.weights, forwards=config.forwards is not None,
    )  # fmt: skip
    forwards = None
    if config.forwards is not None:
        forwards = ForwardStore(
            make_folder(config.forwards), model.params, config=model.config, mesh=mesh,
            base_fingerprint=base, chunk=config.chunk, weights=config.weights,
        )  # fmt: skip
    state = _start(config, model, optimizer, mesh)
    first, state = checkpoints.restore(state) or (0, state)
    if jax.process_index() == 0:
        atomic_write(config.run / "config.json", json.dumps(described, indent=2) + "\n")
    metrics = MetricsLog(
        config.run / "metrics.jsonl", first, every=config.log_every,
        patience=config.stop_after_skipped, on_metrics=on_metrics,
    )  # fmt: skip
    trace_from, trace_to = config.profile or (-1, -1)

    def export() -> None:
        save_modules(config.run / "modules", state.modules, params=model.params)

    def save(done: int) -> None:
        metrics.flush()
        checkpoints.save(done, state)
        export()

    if first:  # a run that was killed may have a checkpoint and not its modules
        export()
    with stop_requests() as stop_requested, contextlib.ExitStack() as trace:
        for step in steps(first, config.steps):
            if not data.has(step):
                if step > first:
                    save(step)
                raise RowsMissing(step, config)
            if step == trace_from:
                trace.enter_context(jax.profiler.trace(str(config.run / "profile")))
            batch = data.batch_of(step, config.micro_batches, microbatch_sharding(mesh))
            if forwards is not None:
                batch = forwards.batch(batch)
            state, values = step_fn(model.params, state, batch)
            metrics.add(step, values)
            if step == trace_to:
                jax.block_until_ready(state)
                trace.close()
            done, stop = step + 1, stop_requested(step)
            if stop or done == config.steps or done % config.save_every == 0:
                save(done)
            if stop and done < config.steps:
                say(
                    f"stopped after step {done} of {config.steps}; {config.run / 'modules'} holds "
                    "the modules so far, and the same command goes on"
                )
                return None
    return state


def _start(config: TrainConfig, model: Model, optimizer: Any, mesh: Mesh) -> TrainState:
    """The state before the first step, on every device.

    Raises ValueError if the modules to start from have other sizes, and as `load_modules`.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    if config.start is not None:
        modules = load_modules(
            config.start, params=model.params, config=model.config, dtype=jnp.float32
        )
        wanted = with_targets_of(model.config, config.modules)
        sizes = dataclasses.replace(modules.config, init=wanted.init, memory=wanted.memory)
        if sizes != wanted:
            raise ValueError(
                f"{config.start}: these modules have other sizes than the run: "
                f"{modules.config.described}, not {wanted.described}"
            )
        started = partial(init_state, optimizer=optimizer)
        return jax.jit(started, out_shardings=replicated)(
            dataclasses.replace(modules, config=wanted)
        )

    def init(params: Params) -> TrainState:
        key = jax.random.key(config.seed)
        modules = init_modules(key, config.modules, model.config, params=params)
        return init_state(modules, optimizer)

    return jax.jit(init, out_shardings=replicated)(model.params)


def join_cluster() -> None:
    """Connects to the other processes of the job, if the environment says that there are any.

    Cloud TPU, Slurm, Open MPI and Kubernetes are recognised by JAX. Elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    env = os.environ
    sizes = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    several = any(int(env.get(name) or 1) > 1 for name in sizes)
    kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    tpu = importlib.util.find_spec("libtpu") is not None and any(
        path.exists() for path in map(Path, ("/dev/accel0", "/dev/vfio/0"))
    )
    if several or kubernetes or tpu:
        count, own = (env.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if own is None else int(own),
        )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 also when a signal has ended the run cleanly."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    def work(config: TrainConfig) -> None:
        join_cluster()
        train(config)

    return run_command(
        lambda: parse_config(sys.argv[1:] if args is None else args),
        work,
        prog="lookahead train lookahead",
    )


if __name__ == "__main__":
    end_process(main())
