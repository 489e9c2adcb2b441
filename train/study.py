"""Train many sets of lookahead modules at once: seeds, ablations, folds of unseen data.

    lookahead train study STUDY --model DIR --data NAME=DIR ... --run DIR

STUDY is a JSON file, or the name of one in train/configs/studies. It has the steps, the batch, and
`modules`, `optimizer`, `loss` and `seed` that all variants share; each of its `variants` may
override them and learn `without` some of the named data. A step reads its prompts once for all
variants, which is most of the work, and not at all where `--forwards` knows them. Otherwise each
variant trains as in `train.lookahead`, except that all variants share one order of the data. The
same command resumes. RUN receives study.json, metrics.jsonl (a loss per variant), checkpoints/ and,
at the end, a folder with the modules of each variant.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lookahead_jax.checkpoints.load import load
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.config_files import read_config
from lookahead_jax.host.files import atomic_write, make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.jit import compiler_options
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import make_mesh, param_shardings
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.modules.files import save_modules
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.prefilling.layer_pass import CHUNK
from lookahead_jax.train.batches import forward_sharding, microbatch_sharding
from lookahead_jax.train.checkpoints import Checkpoints
from lookahead_jax.train.forwards import ForwardStore
from lookahead_jax.train.loss import LossConfig
from lookahead_jax.train.metrics import MetricsLog
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.progress import say, steps
from lookahead_jax.train.step import StepMetrics, TrainState, check_batch, init_state, variants_step
from lookahead_jax.train.training_data import TrainingData, open_data

_STUDIES = Path(__file__).parent / "configs" / "studies"
_PATIENCE = 50  # steps in a row without an update that end a study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One set of modules."""

    modules: LookaheadConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    seed: int
    """Seed of the initial modules."""
    without: tuple[str, ...] = ()
    """Names of the data that this variant does not learn from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Variants and the training steps they share."""

    steps: int
    batch: int
    micro_batches: int
    data_seed: int
    """Seed of the order of the data."""
    variants: dict[str, Variant]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Train the variants of a study; the same command resumes."""

    study: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDY")]
    """A .json file, or the name of one in train/configs/studies."""
    model: Path
    """Folder of the base model, which is not changed."""
    data: tuple[str, ...]
    """Folders written by `lookahead train data`, as NAME=DIR."""
    run: Path
    """Folder of the run, made if it does not exist. An existing run is resumed."""
    forwards: Path | None = None
    """Cache folder for the base model's keys, values and targets of each row, as for
    `lookahead train lookahead`; both can share it. None: nothing is cached."""
    save_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between writes of metrics.jsonl, which has a line for every step."""


def read_study(name: str) -> Study:
    """The study in a file, every field checked; ValueError says what is wrong with it."""
    content = read_config(name, _STUDIES)
    shared = {part: content.pop(part, {}) for part in ("modules", "optimizer", "loss")}
    seed = content.pop("seed", 0)
    try:
        variants = {}
        for label, own in content.pop("variants").items():
            sizes = shared["modules"] | own.pop("modules", {})
            variants[label] = Variant(
                modules=LookaheadConfig(**sizes | {"targets": tuple(sizes["targets"])}),
                optimizer=OptimizerConfig(**shared["optimizer"] | own.pop("optimizer", {})),
                loss=_loss(shared["loss"] | own.pop("loss", {})),
                seed=own.pop("seed", seed),
                without=tuple(own.pop("without", ())),
                **own,
            )
        if not variants:
            raise ValueError("it has no variants")
        return Study(variants=variants, **content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error


def _loss(fields: dict[str, Any]) -> LossConfig:
    fields = dict(fields)
    if "budgets" in fields:
        fields["budgets"] = tuple(fields["budgets"])
    if "policy" in fields:
        fields["policy"] = LookaheadKV(**fields["policy"])
    return LossConfig(**fields)


def rows_used(study: Study, data: TrainingData, names: tuple[str, ...], step: int) -> np.ndarray:
    """Rows of the batch of `step` that each variant learns from: bool [V, A, B]."""
    folder = data.folder[data.rows_of(step)].reshape(study.micro_batches, -1)
    return np.stack(
        [
            ~np.isin(folder, [names.index(name) for name in variant.without])
            for variant in study.variants.values()
        ]
    )


def train_study(config: StudyConfig) -> None:
    """Trains every variant to the end and writes its modules.

    Raises ValueError for a study that does not fit model or data, FloatingPointError when too many
    steps in a row are skipped by all variants, BlockingIOError if another process writes the run.
    """
    study = read_study(config.study)
    folders = _folders(config.data)
    for label, variant in study.variants.items():
        if unknown := set(variant.without) - folders.keys():
            raise ValueError(f"{label} leaves out {', '.join(unknown)}, which --data does not name")
    if config.save_every < 1:
        raise ValueError(f"save_every must be at least 1, not {config.save_every}")
    mesh = make_mesh(data=None, fsdp=1, tensor=1)
    check_batch(study.batch, study.micro_batches, mesh)
    make_folder(config.run)
    with folder_lock(config.run):
        _train(config, study, folders, mesh)


def _train(config: StudyConfig, study: Study, folders: dict[str, Path], mesh: Mesh) -> None:
    """`train_study` of a checked study, in a folder that no other process writes."""
    say(f"loading {config.model}")
    model = load(config.model, mesh=mesh)
    base = fingerprint(model.params)
    data = open_data(
        tuple(folders.values()), batch=study.batch, seed=study.data_seed, base_fingerprint=base
    )
    forwards = None
    if config.forwards is not None:
        forwards = ForwardStore(
            make_folder(config.forwards), model.params, config=model.config, mesh=mesh,
            base_fingerprint=base, chunk=CHUNK,
        )  # fmt: skip
    begin, step_fn = _programs(study, model.config, mesh, forwards=forwards is not None)
    described = dataclasses.asdict(study)
    for label, variant in study.variants.items():
        changed = {"modules": variant.modules.described, "loss": variant.loss.described}
        described["variants"][label] |= changed
    described = json.loads(json.dumps(described))
    identity = described | {"base": base, "data": list(folders)}
    if forwards is not None:  # float16 keys and values
        identity |= {"forwards": True}
    with (
        jax.set_mesh(mesh),
        Checkpoints(config.run / "checkpoints", keep=1, identity=identity) as checkpoints,
    ):
        states = begin(model.params)
        first, states = checkpoints.restore(states) or (0, states)
        atomic_write(config.run / "study.json", json.dumps(described, indent=2) + "\n")
        log = MetricsLog(
            config.run / "metrics.jsonl", first, every=config.log_every, patience=_PATIENCE
        )
        for step in steps(first, study.steps):
            batch = data.batch_of(step, study.micro_batches, microbatch_sharding(mesh))
            if forwards is not None:
                batch = forwards.batch(batch)
            used = rows_used(study, data, tuple(folders), step)
            states, metrics = step_fn(model.params, states, batch, used)
            log.add(step, _joined(study.variants, metrics))
            done = step + 1
            if done == study.steps or done % config.save_every == 0:
                log.flush()
                checkpoints.save(done, states)
    for label, state in zip(study.variants, states, strict=True):
        save_modules(config.run / label, state.modules, params=model.params)


def _programs(study: Study, config: ModelConfig, mesh: Mesh, *, forwards: bool) -> tuple[Any, Any]:
    """Jitted: weights -> the state of every variant before the first step, and `variants_step`."""
    variants = tuple(study.variants.values())
    optimizers = tuple(make_optimizer(variant.optimizer, study.steps) for variant in variants)
    replicated = NamedSharding(mesh, PartitionSpec())

    def begin(params: Params) -> tuple[TrainState, ...]:
        return tuple(
            init_state(init_modules(jax.random.key(v.seed), v.modules, config, params=params), opt)
            for v, opt in zip(variants, optimizers, strict=True)
        )

    step = jax.jit(
        partial(
            variants_step, config=config, optimizers=optimizers,
            losses=tuple(variant.loss for variant in variants),
        ),
        in_shardings=(
            param_shardings(config, mesh), replicated,
            forward_sharding(mesh) if forwards else microbatch_sharding(mesh), replicated,
        ),
        out_shardings=replicated,
        donate_argnums=1,
        compiler_options=compiler_options(),
    )  # fmt: skip
    return jax.jit(begin, out_shardings=replicated), step


def _folders(data: tuple[str, ...]) -> dict[str, Path]:
    folders = {}
    for text in data:
        name, _, folder = text.partition("=")
        if not folder or name in folders:
            raise ValueError(f"--data {text}: expected NAME=DIR, every name once")
        folders[name] = Path(folder)
    return folders


def _joined(labels: Iterable[str], metrics: Sequence[StepMetrics]) -> StepMetrics:
    """The metrics of all variants as one line; a study goes on while any of them learns."""
    named = list(zip(labels, metrics, strict=True))
    return {
        **{f"loss/{label}": m["loss"] for label, m in named},
        **{f"skipped/{label}": m["skipped"] for label, m in named},
        "prompt_tokens": metrics[0]["prompt_tokens"],
        "skipped_in_a_row": jnp.stack([m["skipped_in_a_row"] for m in metrics]).min(),
    }


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    prog = "lookahead train study"
    return run_command(lambda: tyro.cli(StudyConfig, args=args, prog=prog), train_study, prog=prog)


if __name__ == "__main__":
    end_process(main())
