"""The configuration of a comparison, and the settings that identify its run."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lookahead_jax.eval.compare.methods import FOLDS, METHODS, SHIPPED, chosen_at
from lookahead_jax.eval.tasks.own.code import CODE, Split
from lookahead_jax.modules.files import CONFIG_FILE

COMPARED_TASKS = ("records", "tagged", "spans", "chains", "multi_lookup", CODE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare eviction policies on the answers of one model."""

    out: Path
    """Folder of the run, created if missing. The same command resumes the run."""
    model: Path | None = None
    """Folder of the model. Default: the embedded one."""
    modules: tuple[str, ...] = ()
    """Trained modules as LABEL=DIR. Several with one label are seeds; {fold} in DIR stands for the
    fold of the tested task. Default: those that ship with the package."""
    settings: tuple[str, ...] = ()
    """Settings of the learned policy, as NAME=VALUE (`pool=max`)."""
    tasks: tuple[str, ...] = COMPARED_TASKS
    """Tasks: records, tagged, spans, chains, lookup, multi_lookup, code."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Policies to compare."""
    length: int = 512
    """Tokens of a prompt, question included."""
    count: int = 128
    """Prompts of each task."""
    batch: int = 32
    """Prompts per batch."""
    split: Split = "test"
    """Split that the prompts come from."""
    tune: bool = False
    """Choose the baselines' settings on the validation split, and store them."""

    def __post_init__(self) -> None:
        for kind, names, known in (("task", self.tasks, FOLDS), ("method", self.methods, METHODS)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"unknown {kind} {unknown[0]!r}; known: {', '.join(known)}")


def modules_of(config: CompareConfig, task: str) -> Iterator[tuple[str, Path]]:
    """Label and folder of the modules that are tested on a task."""
    for text in config.modules or SHIPPED:
        label, _, folder = text.partition("=")
        if not folder:
            raise ValueError(f"--modules {text}: expected LABEL=DIR")
        yield label, Path(folder.format(fold=FOLDS[task]))


def identity(config: CompareConfig, base: str) -> dict[str, Any]:
    """The settings that determine the numbers of a run, tasks and methods excepted.

    Modules (of all folds) are identified by the digests of their config files, which hold those of
    their tensors.
    """
    folders = dict.fromkeys(pair for task in FOLDS for pair in modules_of(config, task))
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
