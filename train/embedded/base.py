"""Train the embedded base model: a small Llama-style decoder on Python sources and retrieval tasks.

    python -m lookahead_jax.train.embedded.corpus --out CORPUS
    python -m lookahead_jax.train.embedded.base --corpus CORPUS --out RUN

A run is resumed by the same command; metrics go to RUN/metrics.jsonl, the state to RUN/state.npz.
"""

import dataclasses
import json
import pathlib
import time
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro
from optax.contrib import MuonDimensionNumbers, muon

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.eval.tasks.own.prompts import TASKS, make_batch
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.host.files import save_arrays
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import Block, embed, forward, logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params, init_params, unstack
from lookahead_jax.train.embedded.mixture import Rows, stretched_positions, task_rows, text_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """One training run of the base model."""

    corpus: pathlib.Path
    """Directory written by train.corpus."""
    out: pathlib.Path
    """Run directory."""
    start: pathlib.Path | None = None
    """Run whose weights this one starts from, of the same sizes; None starts from random ones."""
    hidden: int = 192
    """Width D of the residual stream."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """KV heads."""
    head_dim: int = 64
    """Dimension of a head."""
    mlp: int = 512
    """Width F of the gated MLP."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    lengths: tuple[int, ...] = (128, 256, 128, 256, 128, 256, 576)
    """Row length of each stage."""
    steps: tuple[int, ...] = (300, 200, 300, 50, 200, 250, 650)
    """Optimizer steps of each stage."""
    step_tokens: int = 4608
    """Tokens of one optimizer step, text and tasks together."""
    repeats: tuple[float, ...] = (0.0, 0.0, 0.3, 0.15, 0.25, 0.1, 0.05)
    """Share of the task rows of each stage that are plain copies."""
    fill: tuple[float, ...] = (0.8, 0.8, 0.5, 0.7, 0.5, 0.7, 0.85)
    """Largest share of a task row that is document; the rest is questions."""
    stretch: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5)
    """Share of the rows of each stage whose positions are spread up to `max_position`."""
    max_position: int = 2048
    """Longest prompt and answer that the model is meant for."""
    task_share: float = 0.5
    """Share of the rows that are task documents."""
    task_weight: float = 0.5
    """Weight of the task loss; the text loss has 1 minus it."""
    micro_rows: tuple[int, ...] = (8, 4, 8, 4, 8, 4, 2)
    """Rows of one micro-batch in each stage."""
    muon_rate: float = 6e-3
    """Peak learning rate of the matrices (Muon, updates scaled to RMS 0.2)."""
    adam_rate: float = 4e-3
    """Peak learning rate of the embeddings and norms (Adam)."""
    warmup: int = 40
    """Steps of linear warm-up."""
    decay: float = 0.4
    """Share of the run, at its end, in which the rates fall linearly to zero."""
    seed: int = 0
    """Initial weights and the order of the data."""
    save_every: int = 50
    """Steps between checkpoints."""
    eval_every: int = 100
    """Steps between evaluations on held-out prompts and text."""

    def hf(self, vocab_size: int, eos: int) -> dict[str, Any]:
        """The config.json of the trained model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": self.max_position,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": eos,
            "torch_dtype": "float32",
        }


def start_params(config: BaseConfig, model: ModelConfig) -> Params:
    """Weights of an earlier run, or random ones whose writes into the residual stream are small."""
    if config.start is not None:
        return read_params(config.start, model)
    params = init_params(jax.random.key(config.seed), model, jnp.float32)
    small = (2 * model.num_layers) ** -0.5
    layers = params["layers"]
    return params | {"layers": layers | {"o": layers["o"] * small, "down": layers["down"] * small}}


def optimizer(config: BaseConfig) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the rest; warm-up, constant, linear decay to zero."""
    total = sum(config.steps)

    def schedule(step):
        left = (total - step) / max(1.0, config.decay * total)
        return jnp.minimum(jnp.minimum((step + 1) / config.warmup, 1.0), left)

    matrices: dict[str, Any] = {name: MuonDimensionNumbers(1, 2) for name in ("gate", "up", "down")}
    matrices |= {name: MuonDimensionNumbers(1, (2, 3)) for name in ("q", "k", "v")}
    matrices["o"] = MuonDimensionNumbers((1, 2), 3)

    def dimensions(params: Params) -> Any:
        return {
            name: {n: matrices.get(n) for n in leaf} if name == "layers" else None
            for name, leaf in params.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            lambda step: config.muon_rate * schedule(step),
            adam_learning_rate=lambda step: config.adam_rate * schedule(step),
            adam_b1=0.9,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=cast(Any, dimensions),
        ),
    )


def token_losses(params: Params, rows: Rows, *, model: ModelConfig):
    """-log p of the token after each picked position, and whether it is the likeliest: [B, Q]."""
    tokens, positions, picks, _ = rows
    x = embed(params, tokens[:, :-1], config=model)
    block = Block(x=x, positions=positions, rope_span=positions[:, -1] + 1)
    hidden = forward(params, block, None, config=model).hidden
    hidden = jnp.take_along_axis(hidden, picks[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, picks + 1, axis=1)
    scores = logits(params, hidden, config=model)
    nll = (
        jax.nn.logsumexp(scores, axis=-1)
        - jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    )
    return nll, scores.argmax(-1) == targets


def mean_loss(params: Params, rows: Rows, *, model: ModelConfig):
    """Mean loss over micro-batches [n, B, ...], the share of right tokens, and the gradient."""
    total = jnp.maximum(rows.weights.sum(), 1.0)

    def micro(params, part):
        nll, right = token_losses(unstack(params), part, model=model)
        return (nll * part.weights).sum() / total, (right * part.weights).sum() / total

    def step(carry, part):
        (loss, right), grads = jax.value_and_grad(micro, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, carry, (loss, right, grads)), None

    zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(step, zero, rows)[0]


@program(static_argnames=("config", "model"), donate_argnames=("params", "state"))
def train_step(
    params: Params, state, text: Rows, tasks: Rows, *, config: BaseConfig, model: ModelConfig
):
    """One optimizer step on text and task micro-batches."""
    text_loss, _, text_grads = mean_loss(params, text, model=model)
    task_loss, right, task_grads = mean_loss(params, tasks, model=model)
    w = config.task_weight
    grads = jax.tree.map(lambda a, b: (1 - w) * a + w * b, text_grads, task_grads)
    norm = optax.global_norm(grads)
    updates, state = optimizer(config).update(grads, state, params)
    metrics = {
        "text_loss": text_loss,
        "task_loss": task_loss,
        "task_right": right,
        "grad_norm": norm,
    }
    return optax.apply_updates(params, updates), state, metrics


@program(static_argnames=("model",))
def evaluate_rows(params: Params, rows: Rows, *, model: ModelConfig):
    return token_losses(unstack(params), rows, model=model)


def evaluate(params: Params, tokens: np.ndarray, first: int, *, model: ModelConfig):
    """-log p and greedy agreement of the tokens from index `first` on: two arrays [rows, Q]."""
    length = tokens.shape[1] - 1
    positions = np.tile(np.arange(length, dtype=np.int32), (len(tokens), 1))
    picks = positions[:, first - 1 :]
    size, parts = max(1, 4096 // length), []
    for i in range(0, len(tokens), size):
        part = Rows(*(a[i : i + size] for a in (tokens, positions, picks, picks)))
        parts.append(jax.tree.map(np.asarray, evaluate_rows(params, part, model=model)))
    nll, right = (np.concatenate(a) for a in zip(*parts, strict=True))
    return nll, right


def exact_match(
    params: Params,
    task: str,
    words: Words,
    *,
    model: ModelConfig,
    count: int,
    length: int,
    seed: int,
    **knobs: Any,
) -> np.ndarray:
    """Whether greedy decoding answers exactly, for fresh prompts of `length` tokens: bool [count].

    By teacher forcing: the greedy answer is right when every right prefix continues rightly.
    """
    prompts, answers = make_batch(task, words, count=count, seed=seed, length=length, **knobs)
    tokens = np.concatenate([prompts, np.maximum(answers, 0)], axis=1)
    _, right = evaluate(params, tokens, length, model=model)
    return np.all(right | (answers < 0), axis=1)


def text_loss(
    params: Params, stream: np.ndarray, *, model: ModelConfig, rows: int, length: int = 512
) -> float:
    """Mean nats per token over `rows` evenly spaced windows of the held-out text."""
    starts = np.linspace(0, len(stream) - length - 2, rows).astype(np.int64)
    tokens = stream[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return float(evaluate(params, tokens, 1, model=model)[0].mean())


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
) -> tuple[Rows, Rows]:
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

    def micro_batches(part: Rows) -> Rows:
        positions = stretched_positions(
            rng,
            rows=len(part.tokens),
            length=length,
            reach=config.max_position,
            share=config.stretch[stage],
        )
        part = part._replace(positions=positions)
        return Rows(*(a.reshape(-1, micro, a.shape[1]) for a in part))

    return micro_batches(text), micro_batches(tasks)


def main(config: BaseConfig) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(config.corpus / "tokenizer.json"))
    words = Words.of(tokenizer)
    train, valid = (np.load(config.corpus / f"{name}.npy") for name in ("train", "valid"))
    hf = config.hf(tokenizer.get_vocab_size(), words.eos)
    model = config_from_hf(hf)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "run.json").write_text(
        json.dumps(dataclasses.asdict(config), default=str, indent=1)
    )
    (config.out / "config.json").write_text(json.dumps(hf, indent=1))

    params = start_params(config, model)
    state = optimizer(config).init(params)
    start, checkpoint = 0, config.out / "state.npz"
    if checkpoint.exists():
        params, state, start = restore(checkpoint, (params, state, np.int32(0)))
    plan = [stage for stage, count in enumerate(config.steps) for _ in range(count)]
    with open(config.out / "metrics.jsonl", "a") as log:
        for step in range(int(start), len(plan)):
            began = time.perf_counter()
            length = config.lengths[plan[step]]
            text, tasks = draw(config, words, train, step, plan[step])
            params, state, metrics = train_step(
                params, state, text, tasks, config=config, model=model
            )
            metrics = {name: round(float(value), 4) for name, value in metrics.items()}
            line = {"step": step, "length": length, **metrics}
            line["tokens"] = int(text.positions.size + tasks.positions.size)
            line["seconds"] = round(time.perf_counter() - began, 3)
            done = step + 1 == len(plan)
            if (step + 1) % config.eval_every == 0 or done:
                size = min(length, 512)
                match = partial(
                    exact_match, words=words, model=model, count=32, length=size, seed=10**6
                )
                if size == 512:
                    line["exact"] = {task: float(match(params, task).mean()) for task in TASKS}
                line["valid_loss"] = round(text_loss(params, valid, model=model, rows=32), 4)
            if (step + 1) % config.save_every == 0 or done:
                save(checkpoint, (params, state, np.int32(step + 1)))
            log.write(json.dumps(line) + "\n")
            log.flush()


if __name__ == "__main__":
    main(tyro.cli(BaseConfig))
