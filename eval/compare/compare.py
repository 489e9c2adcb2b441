"""Compare eviction policies on the embedded model's tasks, at many budgets, with intervals.

    python -m lookahead_jax.eval.compare --out RUN               # the shipped table, 512 tokens
    python -m lookahead_jax.eval.compare --out RUN --length 2048 # the same at 2048 tokens
    python -m lookahead_jax.eval.compare --out RUN --tune        # choose the baselines' settings

Prompts are fresh (test and validation have seeds and code files of their own, training others).
One RUN for each of these: settings other than those in RUN/settings.json are refused. A run is
resumed by the same command, or widened by other tasks and methods: finished cells, one file per
task and method, are kept. It ends by writing RUN/summary.json and RUN/table.md.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model
from lookahead_jax.eval.command import run_command
from lookahead_jax.eval.compare.masked import Reference, keep_masks, outcome, read_full
from lookahead_jax.eval.compare.methods import (
    FOLDS,
    LOOKAHEAD,
    METHODS,
    ORACLE,
    SHIPPED,
    Setting,
    build,
    chosen_at,
    read_chosen,
    setting_of,
    write_chosen,
)
from lookahead_jax.eval.compare.summary import best_settings, write_summary
from lookahead_jax.eval.tasks.own.code import CODE, Split, code_prompts, code_stream
from lookahead_jax.eval.tasks.own.prompts import comments, make_example, text_lines
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.host.files import save_arrays
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.model.params import fingerprint
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.modules.files import CONFIG_FILE, load_modules

PROG = "python -m lookahead_jax.eval.compare"
TASKS = ("records", "tagged", "spans", "chains", "multi_lookup", CODE)
ANSWER = 16  # tokens that the longest answer of a task may have
SEEDS: dict[Split, int] = {"test": 7_000_000, "validation": 8_000_000}
SHARES = (0.025, 0.05, 0.1, 0.2, 0.3)
COUNTS = (64, 128, 256, 512)
RESULTS = "*/*.npz"  # in the folder of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared on what."""

    out: Path
    """Folder of the run, made if need be."""
    model: Path | None = None
    """Folder of the model; left out, the embedded one."""
    modules: tuple[str, ...] = ()
    """Trained modules as LABEL=DIR; several with one label are seeds; {fold} in DIR stands for the
    fold of tasks that is tested. Left out, those that ship with the package."""
    settings: tuple[str, ...] = ()
    """Fields of the learned policy that are not at their defaults, as NAME=VALUE (`pool=max`)."""
    tasks: tuple[str, ...] = TASKS
    """Tasks, of records, tagged, spans, chains, lookup, multi_lookup and code."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Policies."""
    length: int = 512
    """Tokens of a prompt, question included."""
    count: int = 128
    """Prompts of each task."""
    batch: int = 32
    """Prompts at a time."""
    split: Split = "test"
    """Which prompts."""
    tune: bool = False
    """Choose the baselines' settings on the validation split, and write them down."""


class Examples(NamedTuple):
    """The prompts of a task."""

    prompts: np.ndarray  # [N, T] int32
    answers: np.ndarray | None  # [N, ANSWER] int32, -1 padded; None: the model's own response


class Cell(NamedTuple):
    """One method on one task; U budgets, N prompts."""

    exact: np.ndarray  # [U, N] float32 1 where the whole answer is right
    kl: np.ndarray  # [U, N] float32 nats, mean over the answer of KL(full || evicted)
    followed: np.ndarray  # [U, N] float32 share of the answer before the first token that differs
    recall: np.ndarray  # [U, N] float32 share of the oracle's entries that are kept


def budgets_at(length: int) -> tuple[int, ...]:
    """Entries kept: shares of the prompt and round numbers, ascending, below the prompt."""
    shares = {round(share * length) for share in SHARES}
    return tuple(sorted(shares | {count for count in COUNTS if count < length}))


def examples(task: str, words: Words, config: CompareConfig, tokenizer) -> Examples:
    """The task's prompts; half of the documents stand among comments, half among held-out code."""
    stream = code_stream(tokenizer, config.split, words.bos)
    if task == CODE:
        shape = dict(count=config.count, length=config.length)
        return Examples(code_prompts(stream, words.bos, **shape), None)
    fillers = (comments(words), text_lines(stream, words))
    found = [
        make_example(
            task, words, seed=(SEEDS[config.split], i), length=config.length, filler=fillers[i % 2]
        )
        for i in range(config.count)
    ]
    answers = np.full((config.count, ANSWER), -1, np.int32)
    for row, example in zip(answers, found, strict=True):
        row[: len(example.answer)] = example.answer
    return Examples(np.stack([e.prompt for e in found]), answers)


def references(model: Model, data: Examples, batch: int) -> list[Reference]:
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


def measure(model: Model, reference: Reference, keep: jax.Array, best: jax.Array) -> Cell:
    """One batch; `keep` and the oracle's `best` are [U, L, B, K, S]."""
    result = outcome(model.params, reference, keep, config=model.config)
    choice, kl = np.asarray(result.choice), np.asarray(result.kl)
    forced = np.asarray(reference.forced)
    full = np.asarray(reference.scores.argmax(-1))
    counts = forced >= 0
    same = (choice == full) | ~counts
    exact = ((choice == forced) | ~counts).all(-1)
    overlap = (keep & best).sum((1, 3, 4)) / jnp.maximum(best.sum((1, 3, 4)), 1)
    return Cell(
        exact=exact.astype(np.float32),
        kl=(kl * counts).sum(-1) / counts.sum(-1),
        followed=((np.cumprod(same, axis=-1) * counts).sum(-1) / counts.sum(-1)).astype(np.float32),
        recall=np.asarray(overlap, np.float32),
    )


class Runner:
    """One model with the tasks' references, computed once per task."""

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
        self.data = examples(task, self.words, self.config, self.tokenizer)
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
    ) -> Cell:
        """A method on a task, one setting per budget."""
        self.open(task)
        cells = []
        for part, best in zip(self.parts, self.best, strict=True):
            keep = best if method == ORACLE else self._keep(part, method, settings, modules)
            cells.append(measure(self.model, part, keep, best))
        return Cell(*(np.concatenate(arrays, axis=1) for arrays in zip(*cells, strict=True)))

    def full(self, task: str) -> Cell:
        """The full cache on a task, as a method with one value at every budget."""
        self.open(task)
        everything = [jnp.ones_like(best[:1]) for best in self.best]
        cells = [
            measure(self.model, part, keep, keep)
            for part, keep in zip(self.parts, everything, strict=True)
        ]
        joined = (np.concatenate(arrays, axis=1) for arrays in zip(*cells, strict=True))
        return Cell(*(np.repeat(a, len(self.budgets), axis=0) for a in joined))


def modules_of(config: CompareConfig, task: str) -> Iterator[tuple[str, Path]]:
    """Label and folder of the modules that are tested on a task."""
    for text in config.modules or SHIPPED:
        label, _, folder = text.partition("=")
        if not folder:
            raise ValueError(f"--modules {text}: expected LABEL=DIR")
        yield label, Path(folder.format(fold=FOLDS[task]))


def identity(config: CompareConfig, base: str) -> dict[str, Any]:
    """What decides the numbers of a run on this model; tasks and methods only say which there are.

    Of the modules (of all folds) it has the digests of their config files, which hold those of the
    tensors.
    """
    folders = dict.fromkeys(found for task in FOLDS for found in modules_of(config, task))
    files = [(label, folder / CONFIG_FILE) for label, folder in folders]
    names = ("length", "count", "split", "tune", "settings")
    return {name: getattr(config, name) for name in names} | {
        "base_fingerprint": base,
        "modules": [
            f"{label}={hashlib.sha256(path.read_bytes()).hexdigest()}"
            for label, path in files
            if path.is_file()
        ],
        "chosen_settings": None if config.tune else chosen_at(config.length),  # --tune writes them
    }


def compare(config: CompareConfig) -> None:
    """Measures every cell that RUN does not hold yet.

    Raises ValueError if RUN was begun with other settings.
    """
    learned = setting_of(config.settings)
    build(LOOKAHEAD, learned)  # complains before anything is measured
    runner = Runner(config)
    base = fingerprint(runner.model.params)
    keep_settings(config.out, identity(config, base), RESULTS)
    jobs: list[tuple[str, str, str, Path | None]] = []
    for task in config.tasks:
        jobs.append((task, "full", "full", None))
        for method in config.methods:
            if method != LOOKAHEAD:
                jobs.append((task, method, method, None))
                continue
            labels: dict[str, int] = {}
            for label, folder in modules_of(config, task):
                seed = labels[label] = labels.get(label, -1) + 1
                jobs.append((task, method, f"{label}.{seed}", folder))
    for task, method, label, folder in tqdm(jobs, unit=" cells"):
        path = config.out / task / f"{label}.npz"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        modules = None
        if folder is not None:
            modules = load_modules(folder, params=runner.model.params, config=runner.model.config)
        if method == "full":
            cell = runner.full(task)
        else:
            settings = (
                [learned] * len(runner.budgets)
                if method == LOOKAHEAD
                else read_chosen(task, method, config.length, runner.budgets)
            )
            cell = runner.cell(task, method, settings, modules)
        save_arrays(path, budgets=np.array(runner.budgets), **cell._asdict())
    write_summary(config.out, length=config.length, base=base)


def tune(config: CompareConfig) -> None:
    """Measures every setting of every baseline on the validation split and keeps the best ones.

    Best means the most exact answers at a task and budget; ties, and code, go to the smaller KL.
    Raises ValueError if RUN was begun with other settings.
    """
    config = dataclasses.replace(config, split="validation")
    runner = Runner(config)
    keep_settings(config.out, identity(config, fingerprint(runner.model.params)), RESULTS)
    jobs = [
        (task, method, number, setting)
        for task in config.tasks
        for method in config.methods
        if len(METHODS[method]) > 1
        for number, setting in enumerate(METHODS[method])
    ]
    for task, method, number, setting in tqdm(jobs, unit=" settings"):
        path = config.out / task / f"{method}.{number}.npz"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            cell = runner.cell(task, method, [setting] * len(runner.budgets))
            save_arrays(path, budgets=np.array(runner.budgets), **cell._asdict())
    write_chosen(best_settings(config.out), config.length, runner.budgets)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; a failure is one line on stderr."""
    return run_command(
        lambda: tyro.cli(CompareConfig, prog=PROG, args=args),
        lambda config: (tune if config.tune else compare)(config),
        prog=PROG,
    )
