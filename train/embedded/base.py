"""Train the embedded base model: a small Llama-style decoder on Python sources and retrieval tasks.

    python -m lookahead_jax.train.embedded.corpus --out CORPUS
    python -m lookahead_jax.train.embedded.base --corpus CORPUS --out RUN

The same command resumes a run. RUN receives metrics.jsonl, and the state in state.npz.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.eval.tasks.own.prompts import OWN_TASKS
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_write, make_folder, save_arrays
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import Params, init_params
from lookahead_jax.train.embedded.base_config import BaseConfig
from lookahead_jax.train.embedded.base_step import base_step, optimizer
from lookahead_jax.train.embedded.corpus import open_tokenizer
from lookahead_jax.train.embedded.measure import exact_match, text_loss
from lookahead_jax.train.embedded.mixture import (
    TrainingRows,
    stretched_positions,
    task_rows,
    text_rows,
)
from lookahead_jax.train.metrics import truncate_log
from lookahead_jax.train.progress import say, steps


def start_params(config: BaseConfig, model: ModelConfig) -> Params:
    """Weights of an earlier run, or random ones whose writes into the residual stream are small."""
    if config.start is not None:
        return read_params(config.start, model)
    params = init_params(jax.random.key(config.seed), model, jnp.float32)
    small = (2 * model.num_layers) ** -0.5
    layers = params["layers"]
    return params | {"layers": layers | {"o": layers["o"] * small, "down": layers["down"] * small}}


def save(path: pathlib.Path, tree: Any) -> None:
    """Writes the leaves of a tree; the old file stays until the new one is complete."""
    leaves = map(np.asarray, jax.tree.leaves(tree))
    save_arrays(path, **{f"arr_{i}": leaf for i, leaf in enumerate(leaves)})


def restore(path: pathlib.Path, like: Any) -> Any:
    """The tree written by `save`, in the structure of `like`."""
    with np.load(path) as file:
        leaves = [jnp.asarray(file[name]) for name in file.files]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_params(run: pathlib.Path, model: ModelConfig) -> Params:
    """The parameters in the last checkpoint of a run."""
    like = init_params(jax.random.key(0), model, jnp.float32)
    with np.load(run / "state.npz") as file:
        leaves = [jnp.asarray(file[name]) for name in file.files[: len(jax.tree.leaves(like))]]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def draw(
    config: BaseConfig, words: Words, stream: np.ndarray, step: int, stage: int
) -> tuple[TrainingRows, TrainingRows]:
    """The data of one step, a function of (seed, step): micro-batches of text and of tasks."""
    rng = np.random.default_rng((config.seed, step))
    length, micro = config.lengths[stage], config.micro_rows[stage]
    rows = config.step_tokens / length
    shares = 1 - config.task_share, config.task_share
    counts = [max(1, round(rows * share / micro)) * micro for share in shares]
    text = text_rows(rng, stream, rows=counts[0], length=length)
    tasks = task_rows(
        rng,
        words,
        stream,
        rows=counts[1],
        length=length,
        repeats=config.repeats[stage],
        fill=config.fill[stage],
    )

    def micro_batches(part: TrainingRows) -> TrainingRows:
        positions = stretched_positions(
            rng,
            rows=len(part.tokens),
            length=length,
            reach=config.max_position,
            share=config.stretch[stage],
        )
        part = part._replace(positions=positions)
        return TrainingRows(*(a.reshape(-1, micro, a.shape[1]) for a in part))

    return micro_batches(text), micro_batches(tasks)


def train_base(config: BaseConfig) -> None:
    """Trains to the last step and writes RUN; resumes from RUN/state.npz if there is one.

    Raises BlockingIOError if another process writes the run.
    """
    tokenizer = open_tokenizer(config.corpus)
    words = Words.of(tokenizer)
    hf = config.hf(tokenizer.get_vocab_size(), words.eos)
    make_folder(config.out)
    with folder_lock(config.out):
        settings = json.dumps(dataclasses.asdict(config), default=str, indent=1)
        atomic_write(config.out / "run.json", settings)
        atomic_write(config.out / "config.json", json.dumps(hf, indent=1))
        _run_steps(config, config_from_hf(hf), words)


def _run_steps(config: BaseConfig, model: ModelConfig, words: Words) -> None:
    say(f"loading {config.corpus}")
    train, valid = (np.load(config.corpus / f"{name}.npy") for name in ("train", "valid"))
    params = start_params(config, model)
    state = optimizer(config).init(params)
    start, checkpoint = 0, config.out / "state.npz"
    if checkpoint.exists():
        params, state, start = restore(checkpoint, (params, state, np.int32(0)))
    stages = [stage for stage, count in enumerate(config.steps) for _ in range(count)]
    truncate_log(config.out / "metrics.jsonl", int(start))
    with open(config.out / "metrics.jsonl", "a") as log:
        for step in steps(int(start), len(stages)):
            began, length = time.perf_counter(), config.lengths[stages[step]]
            text, tasks = draw(config, words, train, step, stages[step])
            params, state, metrics = base_step(
                params, state, text, tasks, config=config, model=model
            )
            line: dict[str, Any] = {"step": step, "length": length}
            line |= {name: round(float(value), 4) for name, value in metrics.items()}
            line["tokens"] = int(text.positions.size + tasks.positions.size)
            line["seconds"] = round(time.perf_counter() - began, 3)
            done = step + 1 == len(stages)
            if (step + 1) % config.eval_every == 0 or done:
                line |= _measured(params, words, valid, model=model, length=min(length, 512))
            if (step + 1) % config.save_every == 0 or done:
                save(checkpoint, (params, state, np.int32(step + 1)))
            log.write(json.dumps(line) + "\n")
            log.flush()


def _measured(
    params: Params, words: Words, valid: np.ndarray, *, model: ModelConfig, length: int
) -> dict[str, Any]:
    """Loss on held-out text and, at 512 tokens, the share of exact answers to each task."""
    measured: dict[str, Any] = {}
    if length == 512:
        match = partial(exact_match, params, words=words, model=model, count=32, length=length)
        measured["exact"] = {task: float(match(task, seed=10**6).mean()) for task in OWN_TASKS}
    measured["valid_loss"] = round(text_loss(params, valid, model=model, rows=32), 4)
    return measured


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "python -m lookahead_jax.train.embedded.base"
    return run_command(lambda: tyro.cli(BaseConfig, args=args, prog=prog), train_base, prog=prog)


if __name__ == "__main__":
    end_process(main())
