"""Measures an embedded base model: loss on held-out text, exact answers to tasks."""

from typing import Any

import jax
import numpy as np

from lookahead_jax.eval.tasks.own.prompts import make_batch
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params, unstack
from lookahead_jax.train.embedded.base_step import token_losses
from lookahead_jax.train.embedded.mixture import TrainingRows


@program(static_argnames=("model",))
def evaluate_rows(params: Params, rows: TrainingRows, *, model: ModelConfig):
    return token_losses(unstack(params), rows, model=model)


def evaluate(params: Params, tokens: np.ndarray, first: int, *, model: ModelConfig):
    """-log p and greedy agreement of the tokens from index `first` on: two arrays [rows, Q]."""
    length = tokens.shape[1] - 1
    positions = np.tile(np.arange(length, dtype=np.int32), (len(tokens), 1))
    picks = positions[:, first - 1 :]
    size, parts = max(1, 4096 // length), []
    for i in range(0, len(tokens), size):
        part = TrainingRows(*(a[i : i + size] for a in (tokens, positions, picks, picks)))
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

    Uses teacher forcing: the greedy answer is right if each prefix of the right answer is
    continued correctly.
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
