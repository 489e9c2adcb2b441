"""Train the head of the drafter `denoiser` for a model.

    lookahead train data --model DIR --source FILE ... --out DATA
    lookahead train denoiser --model DIR --data DATA --run RUN
    lookahead generate --model DIR --drafter denoiser --drafter-arg head=RUN/head.safetensors ...

The base model reads prompts and responses and is not changed; its own responses train best
(train/denoising.py). The same command resumes a run, and Ctrl-C or SIGTERM ends it in order. RUN
receives checkpoints/, metrics.jsonl and, at every checkpoint, head.safetensors. One device trains.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.compute
import tyro

from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import make_folder
from lookahead_jax.host.integers import check_integer
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.modules.denoiser import DenoiserHead, HeadConfig, init_head
from lookahead_jax.modules.denoiser_files import save_head
from lookahead_jax.prefilling.batching import bucket_length
from lookahead_jax.train.checkpoints import Checkpoints, digests
from lookahead_jax.train.denoising import Texts, denoiser_step
from lookahead_jax.train.metrics import MetricsLog, OnMetrics
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.progress import say, steps
from lookahead_jax.train.step import TrainState, init_state
from lookahead_jax.train.stopping import stop_requests
from lookahead_jax.train.training_data import FEATURES, TrainingData, open_data

HEAD = "head.safetensors"
SIZES = HeadConfig(tokens=8, width=512, heads=8, layers=1, vocabulary=None)
ADAM = OptimizerConfig(rate=1e-3, warmup=50, clip=1.0)
_PATIENCE = 50  # steps in a row without a finite loss
_NOT_IDENTITY = ("model", "data", "run", "save_every", "log_every", "dtype")  # free to differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Train the head of the drafter denoiser for a model; the same command resumes."""

    model: Path
    """Folder of the base model, or smollm2; it is not changed."""
    data: tuple[Path, ...]
    """Folders written by `lookahead train data`; their rows are pooled."""
    run: Path
    """Folder of the run, made if it does not exist. An existing run is resumed."""
    head: HeadConfig = SIZES
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
    max_prompt: int | None = None
    """Longest prompt in tokens; rows with a longer one are skipped. None: no limit."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the base weights; None: that of the checkpoint."""
    seed: int = 0
    """Seed of the first head, of the order of the data, and of places and masks."""
    save_every: int = 100
    """Steps between checkpoints; RUN/head.safetensors is written with each."""
    log_every: int = 10
    """Steps between writes of metrics.jsonl, which has a line for every step."""

    def __post_init__(self) -> None:
        for name in ("batch", "places", "save_every", "log_every"):
            check_integer(name, getattr(self, name), least=1)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay} must be above 0 and at most 1")


def texts_of_step(data: TrainingData, step: int) -> Texts:
    """The rows that a step learns from."""
    rows = [data.dataset[int(row)] for row in data.rows_of(step)]
    texts = [np.concatenate([row["prompt"], row["response"]]) for row in rows]
    tokens = np.full((len(rows), bucket_length(max(map(len, texts)))), -1, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    prompt = np.asarray([len(row["prompt"]) for row in rows], np.int32)
    return Texts(jnp.asarray(tokens), jnp.asarray(prompt))


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
        for name in FEATURES
    ]
    often = np.bincount(np.concatenate(columns), minlength=vocab_size)
    return np.sort(np.argsort(-often, kind="stable")[:count]).astype(np.int32)


def train(config: DenoiserConfig, *, on_metrics: OnMetrics | None = None) -> DenoiserHead | None:
    """Trains to the end; None if a signal ended the run before.

    The head so far is written at every checkpoint. `on_metrics` receives every line of
    metrics.jsonl. Raises ValueError for a configuration that does not fit the model, the data or
    an existing run, FloatingPointError when too many steps in a row are skipped, BlockingIOError if
    another process writes the run.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    make_folder(config.run)
    say(f"loading {config.model}")
    model = load(config.model, dtype=config.dtype)
    base = fingerprint(model.params)
    data = open_data(
        config.data, batch=config.batch, seed=config.seed, base_fingerprint=base,
        max_prompt=config.max_prompt,
    )  # fmt: skip
    vocabulary = None
    if config.head.vocabulary is not None:
        ids = frequent_tokens(data, config.head.vocabulary, model.config.vocab_size)
        vocabulary = jnp.asarray(ids)
    described = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    identity = {n: v for n, v in described.items() if n not in _NOT_IDENTITY} | {
        "base": base, "vocabulary": digests(vocabulary),
    }  # fmt: skip

    def start(key: jax.Array) -> TrainState:
        return init_state(init_head(key, config.head, model.config.hidden_size), optimizer)

    with (
        folder_lock(config.run),
        Checkpoints(config.run / "checkpoints", keep=2, identity=identity) as checkpoints,
    ):
        state = jax.jit(start)(jax.random.key(config.seed))
        first, state = checkpoints.restore(state) or (0, state)
        metrics = MetricsLog(
            config.run / "metrics.jsonl", first, every=config.log_every, patience=_PATIENCE,
            on_metrics=on_metrics,
        )  # fmt: skip
        return _run_steps(
            config, model, data, state,
            first=first, vocabulary=vocabulary, metrics=metrics, checkpoints=checkpoints,
        )  # fmt: skip


def _run_steps(
    config: DenoiserConfig,
    model: Model,
    data: TrainingData,
    state: TrainState,
    *,
    first: int,
    vocabulary: jax.Array | None,
    metrics: MetricsLog,
    checkpoints: Checkpoints,
) -> DenoiserHead | None:
    """Trains from step `first` on; None if a signal came before the last one."""
    path, root = config.run / HEAD, jax.random.key(config.seed)

    def trained() -> DenoiserHead:
        return DenoiserHead(state.modules, vocabulary, config.head)

    def save(done: int) -> None:
        metrics.flush()
        checkpoints.save(done, state)
        save_head(path, trained(), params=model.params)

    with stop_requests() as stop_requested:
        for step in steps(first, config.steps):
            state, values = denoiser_step(
                model.params, state, vocabulary, texts_of_step(data, step),
                jax.random.fold_in(root, step), sizes=config.head, config=model.config,
                optimizer=config.optimizer, total=config.steps, places=config.places,
                decay=config.decay,
            )  # fmt: skip
            metrics.add(step, values)
            done, stop = step + 1, stop_requested(step)
            if stop or done == config.steps or done % config.save_every == 0:
                save(done)
            if stop and done < config.steps:
                say(
                    f"stopped after step {done} of {config.steps}; {path} holds the head so far, "
                    "and the same command goes on"
                )
                return None
    return trained()


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 also when a signal has ended the run cleanly."""
    prog = "lookahead train denoiser"
    return run_command(lambda: tyro.cli(DenoiserConfig, args=args, prog=prog), train, prog=prog)


if __name__ == "__main__":
    end_process(main())
