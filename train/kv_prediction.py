"""Train the maps of KV Prediction for a base model and a smaller one, and measure them.

    lookahead train kv-prediction --out RUN
    lookahead eval run embedded --policies full kv_prediction --kv-maps RUN --out EVAL

Only the maps are trained, on the mean absolute error of keys and values. This is the consistency
term of arXiv 2410.08391; its two language-modelling terms also train the small model and are not
implemented. Without --aux the small model consists of the base model's first layers. The texts are
held-out code: one half for training, the other for testing.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model, first_layers
from lookahead_jax.eval.tasks.own.code import Split, code_stream
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_write, make_folder
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.prompts.kv_prediction import (
    KVMaps,
    init_maps,
    plain_kv,
    prediction_loss,
    prefill_predicted,
    save_maps,
)
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.progress import say, steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    """Train the maps of KV Prediction for a base model and a smaller one, and measure them."""

    out: Path
    """Folder for the maps and the report, made if it does not exist."""
    model: Path | None = None
    """Folder of the base model. Default: the embedded model."""
    aux: Path | None = None
    """Folder of a smaller model with the same tokens. Default: the base model's first layers."""
    aux_layers: int = 2
    """Number of first layers that make the small model, if there is no --aux."""
    steps: int = 300
    """Number of updates."""
    batch: int = 8
    """Texts per update."""
    length: int = 256
    """Tokens per text."""
    rate: float = 2e-3
    """Peak learning rate of Adam."""
    tests: int = 64
    """Number of test texts."""
    seed: int = 0
    """Seed of the choice of texts."""


@program(static_argnames=("config", "aux_config", "optimizer"), donate_argnames=("state",))
def maps_step(
    state: tuple[KVMaps, Any],
    params: Params,
    aux_params: Params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    aux_config: ModelConfig,
    optimizer: Any,
) -> tuple[tuple[KVMaps, Any], jax.Array]:
    """One update of (maps, optimizer state) on texts int32 [B, T]; the loss before it."""
    maps, moments = state
    base = plain_kv(params, tokens, config=config)
    aux = plain_kv(aux_params, tokens, config=aux_config)
    loss, gradient = jax.value_and_grad(prediction_loss)(maps, aux, base, tokens >= 0)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, moments = optimizer.update(gradient, moments, maps)
    return (jax.tree.map(jnp.add, maps, updates), moments), loss


def texts(model: Model, split: Split, count: int, length: int, seed: int) -> np.ndarray:
    """Random windows of held-out code after a BOS token: int32 [count, length]."""
    bos = model.generation.bos_id
    if model.tokenizer is None or bos is None:
        raise ValueError(
            f"{model.path} has no tokenizer.json with a BOS token, which the texts need"
        )
    stream = code_stream(model.tokenizer.backend, split, bos)
    starts = np.random.default_rng(seed).integers(0, len(stream) - length, count)
    rows = stream[starts[:, None] + np.arange(length)]
    rows[:, 0] = bos
    return rows


def agreement(model: Model, aux: Model, maps: KVMaps, tokens: jax.Array) -> dict[str, float]:
    """Compares predicted and own cache: next token, KL divergence, seconds to read a batch."""

    def own() -> jax.Array:
        full = lk.make_policy("full")
        read = lk.read_prompt(
            model.params, tokens, config=model.config, policy=full, budget=0, new_tokens=1
        )
        return read.logits

    def predicted() -> jax.Array:
        read = prefill_predicted(
            model.params,
            tokens,
            maps,
            config=model.config,
            aux_params=aux.params,
            aux_config=aux.config,
            new_tokens=1,
        )
        return read.logits

    seconds = []
    for read in (own, predicted):
        jax.block_until_ready(read())
        spent = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(read())
            spent.append(time.perf_counter() - begin)
        seconds.append(float(np.median(spent)))
    true, guess = (jax.nn.log_softmax(read(), axis=-1) for read in (own, predicted))
    return {
        "same_next_token": float((true.argmax(-1) == guess.argmax(-1)).mean()),
        "kl_nats": float((jnp.exp(true) * (true - guess)).sum(-1).mean()),
        "own_s": seconds[0],
        "predicted_s": seconds[1],
    }


def train_maps(config: PredictionConfig) -> dict[str, Any]:
    """Trains, tests and writes the maps and OUT/report.json; returns the report."""
    make_folder(config.out)
    say("loading the models")
    model = lk.load(config.model or lk.EMBEDDED_MODEL)
    aux = first_layers(model, config.aux_layers) if config.aux is None else lk.load(config.aux)
    optimizer = make_optimizer(OptimizerConfig(rate=config.rate, warmup=10), config.steps)
    maps = init_maps(jax.random.key(config.seed), model.config, aux.config)
    rows = texts(
        model, "validation", config.steps * config.batch, config.length, config.seed
    ).reshape(config.steps, config.batch, config.length)
    tests = jnp.asarray(texts(model, "test", config.tests, config.length, config.seed))
    say("testing the untrained maps")
    before = agreement(model, aux, maps, tests)
    tree: Any = maps  # optax declares arrays, and takes any tree of them
    state, losses = (maps, optimizer.init(tree)), []
    for step in steps(0, config.steps):
        batch = rows[step]
        state, loss = maps_step(
            state, model.params, aux.params, jnp.asarray(batch), config=model.config,
            aux_config=aux.config, optimizer=optimizer,
        )  # fmt: skip
        losses.append(float(loss))
    aux_layers = config.aux_layers if config.aux is None else None
    save_maps(config.out, state[0], config.aux and str(config.aux), aux_layers)
    report = {
        "loss_first": losses[0],
        "loss_last": float(np.mean(losses[-10:])),
        "untrained": before,
        "trained": agreement(model, aux, state[0], tests),
    }
    atomic_write(config.out / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train kv-prediction"
    return run_command(
        lambda: tyro.cli(PredictionConfig, args=args, prog=prog),
        lambda config: print(json.dumps(train_maps(config), indent=1)),
        prog=prog,
    )


if __name__ == "__main__":
    end_process(main())
