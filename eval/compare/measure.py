"""Measures methods on a task: forced answers on masked caches, compared with the full cache."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model
from lookahead_jax.eval.compare.config import CompareConfig
from lookahead_jax.eval.compare.masked import Reference, keep_masks, outcome, read_full
from lookahead_jax.eval.compare.methods import ORACLE, Setting, build
from lookahead_jax.eval.tasks.own.code import CODE, Split, code_prompts, code_stream
from lookahead_jax.eval.tasks.own.prompts import comments, make_example, text_lines
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.modules.definition import LookaheadModules

ANSWER = 16  # tokens that the longest answer of a task may have
SEEDS: dict[Split, int] = {"test": 7_000_000, "validation": 8_000_000}
SHARES = (0.025, 0.05, 0.1, 0.2, 0.3)
COUNTS = (64, 128, 256, 512)


class TaskPrompts(NamedTuple):
    """The prompts of a task, and its answers."""

    prompts: np.ndarray  # [N, T] int32
    answers: np.ndarray | None  # [N, ANSWER] int32, -1 padded; None: the model's own response


class Measured(NamedTuple):
    """The measures of one method on one task; U budgets, N prompts."""

    exact: np.ndarray  # [U, N] float32 1 where the whole answer is right
    kl: np.ndarray  # [U, N] float32 nats, mean over the answer of KL(full || evicted)
    followed: np.ndarray  # [U, N] float32 share of the answer before the first token that differs
    recall: np.ndarray  # [U, N] float32 share of the oracle's entries that are kept


def budgets_at(length: int) -> tuple[int, ...]:
    """Entries kept: shares of the prompt and round numbers, ascending, below the prompt."""
    shares = {round(share * length) for share in SHARES}
    return tuple(sorted(shares | {count for count in COUNTS if count < length}))


def task_prompts(task: str, words: Words, config: CompareConfig, tokenizer) -> TaskPrompts:
    """The task's prompts; half of the documents stand among comments, half among held-out code."""
    stream = code_stream(tokenizer, config.split, words.bos)
    if task == CODE:
        shape = dict(count=config.count, length=config.length)
        return TaskPrompts(code_prompts(stream, words.bos, **shape), None)
    fillers = (comments(words), text_lines(stream, words))
    made = [
        make_example(
            task, words, seed=(SEEDS[config.split], i), length=config.length, filler=fillers[i % 2]
        )
        for i in range(config.count)
    ]
    answers = np.full((config.count, ANSWER), -1, np.int32)
    for row, example in zip(answers, made, strict=True):
        row[: len(example.answer)] = example.answer
    return TaskPrompts(np.stack([e.prompt for e in made]), answers)


def references(model: Model, data: TaskPrompts, batch: int) -> list[Reference]:
    """Every batch of the task under the full cache."""
    read = functools.partial(
        read_full, model.params, config=model.config, eos_ids=model.generation.eos_ids
    )
    return [
        read(
            jnp.asarray(data.prompts[at : at + batch]),
            None if data.answers is None else jnp.asarray(data.answers[at : at + batch]),
        )
        for at in range(0, len(data.prompts), batch)
    ]


def measure(model: Model, reference: Reference, keep: jax.Array, best: jax.Array) -> Measured:
    """One batch; `keep` and the oracle's `best` are [U, L, B, K, S]."""
    result = outcome(model.params, reference, keep, config=model.config)
    choice, kl = np.asarray(result.choice), np.asarray(result.kl)
    forced = np.asarray(reference.forced)
    full = np.asarray(reference.scores.argmax(-1))
    counts = forced >= 0
    same = (choice == full) | ~counts
    exact = ((choice == forced) | ~counts).all(-1)
    overlap = (keep & best).sum((1, 3, 4)) / jnp.maximum(best.sum((1, 3, 4)), 1)
    return Measured(
        exact=exact.astype(np.float32),
        kl=(kl * counts).sum(-1) / counts.sum(-1),
        followed=((np.cumprod(same, axis=-1) * counts).sum(-1) / counts.sum(-1)).astype(np.float32),
        recall=np.asarray(overlap, np.float32),
    )


class Comparison:
    """One model, and the current task under its full cache, which is read once per task."""

    def __init__(self, config: CompareConfig):
        self.config = config
        self.model = lk.load(config.model or lk.EMBEDDED_MODEL)
        if self.model.tokenizer is None:
            raise ValueError(
                "the comparison writes its tasks with a tokenizer; this model has none"
            )
        self.tokenizer = self.model.tokenizer.backend
        self.words = Words.of(self.tokenizer)
        self.budgets = budgets_at(config.length)
        self._task = ""

    def open(self, task: str) -> None:
        """Reads the task's prompts under the full cache, once."""
        if task == self._task:
            return
        self.data = task_prompts(task, self.words, self.config, self.tokenizer)
        self.parts = references(self.model, self.data, self.config.batch)
        self.best = [
            self._keep(part, ORACLE, [()] * len(self.budgets), None) for part in self.parts
        ]
        self._task = task

    def _keep(
        self,
        part: Reference,
        method: str,
        settings: Sequence[Setting],
        modules: LookaheadModules | None,
    ) -> jax.Array:
        """[U, L, B, K, S]: each distinct setting scores once, for the budgets that use it."""
        masks: dict[int, jax.Array] = {}
        for setting in dict.fromkeys(settings):
            at = [i for i, chosen in enumerate(settings) if chosen == setting]
            kept = keep_masks(
                self.model.params, part, build(method, setting),
                tuple(self.budgets[i] for i in at), config=self.model.config,
                eos_ids=self.model.generation.eos_ids, modules=modules,
            )  # fmt: skip
            masks |= dict(zip(at, kept, strict=True))
        return jnp.stack([masks[i] for i in range(len(settings))])

    def cell(
        self,
        task: str,
        method: str,
        settings: Sequence[Setting],
        modules: LookaheadModules | None = None,
    ) -> Measured:
        """A method on a task, one setting per budget."""
        self.open(task)
        cells = []
        for part, best in zip(self.parts, self.best, strict=True):
            keep = best if method == ORACLE else self._keep(part, method, settings, modules)
            cells.append(measure(self.model, part, keep, best))
        return Measured(*(np.concatenate(arrays, axis=1) for arrays in zip(*cells, strict=True)))

    def full(self, task: str) -> Measured:
        """The full cache on a task, as a method with one value at every budget."""
        self.open(task)
        everything = [jnp.ones_like(best[:1]) for best in self.best]
        cells = [
            measure(self.model, part, keep, keep)
            for part, keep in zip(self.parts, everything, strict=True)
        ]
        joined = (np.concatenate(arrays, axis=1) for arrays in zip(*cells, strict=True))
        return Measured(*(np.repeat(a, len(self.budgets), axis=0) for a in joined))
