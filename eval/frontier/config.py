"""The configuration of `lookahead eval frontier`, and the methods that it compares."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from lookahead_jax.eval.grid.config import EMBEDDED, Protocol, method_of, modules_folder_of
from lookahead_jax.eval.tasks.registry import find_task
from lookahead_jax.host.config_files import check_at_least_one, cli_with_file
from lookahead_jax.modules.files import CONFIG_FILE
from lookahead_jax.policies.base import WithModules

CONFIGS = Path(__file__).parent / "configs"
PROG = "lookahead eval frontier"
CacheName = Literal["float", "int8"]


class FrontierMethod(NamedTuple):
    """One way to spend the bytes of a cache."""

    policy: str  # as a grid names it, with its settings
    cache: CacheName
    modules: Path | None  # None: those that ship for the model
    label: str

    @property
    def budgeted(self) -> bool:
        """Whether the number of bytes changes its result."""
        return method_of(self.policy).budgeted

    @property
    def single(self) -> bool:
        """Whether it is a policy alone: a float cache and the modules that ship."""
        return self.budgeted and self.cache == "float" and self.modules is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Compare policies and types of cache at equal bytes, on the same examples."""

    out: Path
    """Folder of the run, created if missing. The same command resumes the run."""
    model: str = EMBEDDED
    """The model, as --model of other commands names it; `embedded` is the one that ships."""
    policies: tuple[str, ...] = ("full", "snapkv", "lookaheadkv")
    """Policies, with settings after a colon, as in a grid. POLICY@FOLDER reads the lookahead
    modules of that folder; without, those that ship for the model. In settings of policies
    that read no modules an `@` is part of the value: kvzap:file=a@b.safetensors."""
    caches: tuple[CacheName, ...] = ("float", "int8")
    """Types of cache. float: the type of the weights."""
    entries: tuple[int, ...] = (64, 128, 256)
    """Budgets: the bytes of so many entries of the float cache, per layer and KV head. An int8
    cache keeps as many entries as fit into the same bytes."""
    against: str | None = None
    """Also compare every method with this one, by its label in the tables: kvzip+, or
    'snapkv int8'."""
    tasks: tuple[str, ...] = ("own",)
    """Tasks, or families of tasks such as ruler, longbench, own."""
    lengths: tuple[int, ...] = (512,)
    """Tokens of a prompt. Longer prompts from files lose their middle."""
    protocols: tuple[Protocol, ...] = ("hidden",)
    """seen: the question is part of the compressed prompt; hidden: it is read afterwards."""
    count: int = 32
    """Examples of each task, at most."""
    seed: int = 0
    """Seed of the generated examples."""
    batch: int = 8
    """Examples per batch."""
    data: Path | None = None
    """Folder of the benchmarks' files; see docs/evaluation.md."""
    max_new_tokens: int | None = None
    """Upper limit of every answer, below that of its task."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights and of the float cache. Default: that of the checkpoint."""
    pair_times: tyro.conf.FlagConversionOff[bool] = False
    """Also read every batch with the full cache, so that the time a policy adds to the first token
    can be trusted on a machine with changing load."""

    def __post_init__(self) -> None:
        for name in ("policies", "caches", "entries", "tasks", "lengths", "protocols"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"--{name} names nothing")
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} names one value twice")
        check_at_least_one(self, "count", "batch", "lengths", "max_new_tokens")
        if min(self.entries) < 1:
            raise ValueError(
                f"--entries {min(self.entries)}: such a budget is below one entry; give numbers of "
                "at least 1"
            )
        if refused := [t.name for name in self.tasks for t in find_task(name) if t.executes]:
            raise ValueError(
                f"--tasks: {', '.join(refused)} runs programs that the model writes, which only "
                "`lookahead eval run --allow-exec` does"
            )
        for spec in self.policies:
            _check_policy(spec, self.model)
        labels = [method.label for method in self.methods if method.budgeted]
        if not labels:
            raise ValueError("--policies keep everything: name one that a budget changes")
        if self.against is not None and self.against not in labels:
            raise ValueError(
                f"--against {self.against!r} is no label of a method with a budget; there are: "
                f"{', '.join(labels)}"
            )

    @property
    def task_names(self) -> list[str]:
        """All tasks, families resolved."""
        return list(dict.fromkeys(task.name for name in self.tasks for task in find_task(name)))

    @property
    def methods(self) -> tuple[FrontierMethod, ...]:
        """Every policy with every type of cache; ValueError for two folders of one name."""
        pairs = [_parted(spec) for spec in self.policies]
        folders = {folder for _, folder in pairs if folder is not None}
        by_name = Counter(folder.name for folder in folders)
        if twice := [name for name, times in by_name.items() if times > 1]:
            raise ValueError(
                f"--policies name two folders {twice[0]!r}: results are kept by the last part of a "
                "folder's path, so rename one"
            )
        names = [_label(policy, folder) for policy, folder in pairs]
        return tuple(
            FrontierMethod(policy, cache, folder, label if cache == "float" else f"{label} {cache}")
            for (policy, folder), label in zip(pairs, _distinct(names, self.policies), strict=True)
            for cache in self.caches
        )


def parse(args: Sequence[str]) -> FrontierConfig:
    """[CONFIG] and overrides -> the configuration; CONFIG is a .json file, or one that ships.

    Raises ValueError if CONFIG does not exist or does not fit, and UsageError for wrong options.
    """
    return cli_with_file(FrontierConfig, args, CONFIGS, PROG)


def _parted(spec: str) -> tuple[str, Path | None]:
    """POLICY@FOLDER -> both; the folder is None without one.

    In settings of policies that read no modules an `@` is part of the value, such as a path.
    """
    policy, at, folder = spec.rpartition("@")
    in_value = "=" in policy and "lookaheadkv" not in re.split("[:=,]", policy)
    return (spec, None) if not at or in_value else (policy, Path(folder))


def _check_policy(spec: str, model: str) -> None:
    """Raises ValueError for a policy that cannot be compared here, or lacks its modules."""
    policy, folder = _parted(spec)
    method = method_of(policy)
    if method.speculates or method.predicts:
        raise ValueError(f"--policies {spec} needs a small model: use `lookahead eval run`")
    if not isinstance(method.policy.reading, WithModules):
        if folder is not None:
            raise ValueError(f"--policies {spec}: {policy} reads no lookahead modules")
    elif folder is None:
        if modules_folder_of(None, model) is None:
            raise ValueError(f"--policies {spec}: no modules ship for {model}; give {spec}@FOLDER")
    elif not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"--policies {spec}: {folder} has no {CONFIG_FILE}, so it holds no lookahead modules"
        )


def _label(policy: str, folder: Path | None) -> str:
    """The names of a policy without its settings, and the last part of the folder's path."""
    names = ":".join(itertools.takewhile(lambda part: "=" not in part, policy.split(":")))
    return names if folder is None else f"{names}@{folder.name}"


def _distinct(labels: Sequence[str], specs: Sequence[str]) -> list[str]:
    """The labels, with the whole text of a policy where several would have the same label."""
    times = Counter(labels)
    return [spec if times[label] > 1 else label for label, spec in zip(labels, specs, strict=True)]
