"""Compares eviction policies on the embedded model's tasks, at many budgets, with intervals.

    python -m lookahead_jax.eval.compare --out RUN               # the shipped table, 512 tokens
    python -m lookahead_jax.eval.compare --out RUN --length 2048 # the same at 2048 tokens
    python -m lookahead_jax.eval.compare --out RUN --tune        # choose the baselines' settings

Prompts are fresh: test, validation and training have their own seeds and code files. Each of these
needs its own RUN, since settings other than those in RUN/settings.json are refused. The same
command resumes a run, and other tasks and methods extend it: finished cells, one file per task and
method, are kept. At the end, RUN/summary.json and RUN/table.md are written.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from lookahead_jax.eval.compare.config import CompareConfig, identity, modules_of
from lookahead_jax.eval.compare.measure import Comparison, Measured
from lookahead_jax.eval.compare.methods import (
    LOOKAHEAD,
    METHODS,
    Setting,
    build,
    read_chosen,
    setting_of,
    write_chosen,
)
from lookahead_jax.eval.compare.summary import best_settings, write_summary
from lookahead_jax.host.command import run_command
from lookahead_jax.host.files import save_arrays
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.modules.files import load_modules

PROG = "lookahead eval compare"
RESULTS = "*/*.npz"  # in the folder of a run


class _Job(NamedTuple):
    """One cell that a comparison needs."""

    task: str
    method: str
    label: str  # of its file
    modules: Path | None = None


def _jobs(config: CompareConfig) -> Iterator[_Job]:
    for task in config.tasks:
        yield _Job(task, "full", "full")
        for method in config.methods:
            if method != LOOKAHEAD:
                yield _Job(task, method, method)
                continue
            seeds: dict[str, int] = {}
            for label, folder in modules_of(config, task):
                seeds[label] = seeds.get(label, -1) + 1
                yield _Job(task, method, f"{label}.{seeds[label]}", folder)


def _measure(comparison: Comparison, job: _Job, learned: Setting) -> Measured:
    if job.method == "full":
        return comparison.full(job.task)
    if job.method == LOOKAHEAD:
        settings = [learned] * len(comparison.budgets)
    else:
        length = comparison.config.length
        settings = read_chosen(job.task, job.method, length, comparison.budgets)
    modules = None
    if job.modules is not None:
        model = comparison.model
        modules = load_modules(job.modules, params=model.params, config=model.config)
    return comparison.cell(job.task, job.method, settings, modules)


def compare(config: CompareConfig) -> None:
    """Measures every cell that RUN does not hold yet, and writes the summary.

    Raises ValueError if RUN was started with other settings.
    """
    learned = setting_of(config.settings)
    build(LOOKAHEAD, learned)  # raises for wrong settings before anything is measured
    comparison = _open(config)
    for job in tqdm(list(_jobs(config)), unit=" cells"):
        path = config.out / job.task / f"{job.label}.npz"
        if not path.is_file():
            _save(path, comparison, _measure(comparison, job, learned))
    base = fingerprint(comparison.model.params)
    write_summary(config.out, length=config.length, base=base)


def tune(config: CompareConfig) -> None:
    """Measures every setting of every baseline on the validation split and keeps the best ones.

    Best means the most exact answers at a task and budget; ties, and code, go to the smaller KL.
    Raises ValueError if RUN was started with other settings.
    """
    config = dataclasses.replace(config, split="validation")
    comparison = _open(config)
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
            settings = [setting] * len(comparison.budgets)
            _save(path, comparison, comparison.cell(task, method, settings))
    write_chosen(best_settings(config.out), config.length, comparison.budgets)


def _open(config: CompareConfig) -> Comparison:
    """Loads the model and opens the run's folder."""
    print(f"{PROG}: loading the model", file=sys.stderr, flush=True)
    comparison = Comparison(config)
    base = fingerprint(comparison.model.params)
    keep_settings(config.out, identity(config, base), RESULTS)
    return comparison


def _save(path: Path, comparison: Comparison, measured: Measured) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(path, budgets=np.array(comparison.budgets), **measured._asdict())


def main(args: Sequence[str] | None = None) -> int:
    """The command line; a failure is one line on stderr."""
    return run_command(
        lambda: tyro.cli(CompareConfig, prog=PROG, args=args),
        lambda config: (tune if config.tune else compare)(config),
        prog=PROG,
    )
