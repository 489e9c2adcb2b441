"""The rows of a frontier's grids -> means, and paired differences at equal bytes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lookahead_jax.eval.frontier.config import CacheName, FrontierConfig, FrontierMethod
from lookahead_jax.eval.frontier.sizes import CacheSizes
from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.grid.strategies import NONE
from lookahead_jax.eval.report.stats import (
    Stat,
    accuracy,
    average,
    difference,
    overhead,
    read_runs,
    spread,
)

OVER_FLOAT = "int8 minus float"
OVER_SINGLE = "minus the best single policy"

Grids = Mapping[tuple[CacheName, Path | None], Path]
"""(type of cache, folder of modules) -> the folder of its grid."""


class Setting(NamedTuple):
    """What is never averaged over."""

    length: int
    protocol: str


class Place(NamedTuple):
    """A method with the bytes of so many float entries."""

    setting: Setting
    method: FrontierMethod
    entries: int  # 0: everything is kept


class Difference(NamedTuple):
    """First minus second at equal bytes, on the same examples."""

    kind: str
    first: Place
    second: Place
    mean: Stat  # over the tasks
    tasks: Mapping[str, Stat]


class Frontier:
    """The scores of all grids by method, bytes and task, over examples that all methods answered.

    Raises ValueError for folders without rows, and where no setting has answers.
    """

    def __init__(self, config: FrontierConfig, sizes: CacheSizes, grids: Grids):
        self.config, self.sizes = config, sizes
        asked = [Setting(n, p) for n in config.lengths for p in config.protocols]
        self._rows: dict[tuple[Place, str], list[dict[str, Any]]] = {}
        for (cache, modules), folder in grids.items():
            own = {m.policy: m for m in config.methods if (m.cache, m.modules) == (cache, modules)}
            entries = {sizes.kept(n, cache): n for n in config.entries} | {0: 0}
            for cell, rows in read_runs([folder]).items():
                setting = Setting(cell.length, cell.protocol)
                known = cell.policy in own and cell.budget in entries and setting in asked
                if known and _is_asked(cell, config):
                    place = Place(setting, own[cell.policy], entries[cell.budget])
                    self._rows[place, cell.task] = rows
        self._keep_common_examples()
        found = {key: accuracy(rows) for key, rows in self._rows.items()}
        self._scores = {key: stat for key, stat in found.items() if stat is not None}
        self.settings = [setting for setting in asked if self.tasks(setting)]
        self.unanswered = [setting for setting in asked if not self.tasks(setting)]
        if not self.settings:
            raise ValueError(
                f"{config.out} has no answers for these --tasks, --lengths and --protocols"
            )

    def _keep_common_examples(self) -> None:
        """Drops the examples of a task that a method lacks: a resumed run may ask for fewer."""
        common: dict[tuple[Setting, str], set[str]] = {}
        for (place, task), rows in self._rows.items():
            ids = {row["id"] for row in rows}
            common[place.setting, task] = common.get((place.setting, task), ids) & ids
        for place, task in self._rows:
            kept = common[place.setting, task]
            self._rows[place, task] = [row for row in self._rows[place, task] if row["id"] in kept]

    def tasks(self, setting: Setting) -> list[str]:
        """The tasks that have scores."""
        there = {task for place, task in self._scores if place.setting == setting}
        return [task for task in self.config.task_names if task in there]

    def places(self, setting: Setting) -> list[Place]:
        """Method by method in the order of their bytes, those of which every task was answered."""
        found = []
        for method in self.config.methods:
            budgets = sorted(self.config.entries) if method.budgeted else [0]
            found += [Place(setting, method, entries) for entries in budgets]
        tasks = self.tasks(setting)
        return [p for p in found if tasks and all((p, task) in self._scores for task in tasks)]

    def score(self, place: Place, task: str | None = None) -> Stat:
        """Mean score on a task, or over all tasks."""
        if task is not None:
            return self._scores[place, task]
        return average([self._scores[place, name] for name in self.tasks(place.setting)])

    def added_time(self, place: Place) -> Stat | None:
        """What a budget adds to the full cache's time to the first token, as a share of that."""
        setting, method, _ = place
        if not method.budgeted:
            return None
        full = [m for m in self.config.methods if m.cache == method.cache and not m.budgeted]
        shares = []
        for task in self.tasks(setting):
            rows = [self._rows.get((Place(setting, m, 0), task), []) for m in full]
            shares += overhead(self._rows[place, task], next(filter(None, rows), []))
        return spread(shares)

    def slots(self, place: Place) -> int:
        """The most slots per layer and KV head that a batch had, those for answers included.

        Raises ValueError for a cache whose entries are not of the size that was counted with.
        """
        rows = [row for task in self.tasks(place.setting) for row in self._rows[place, task]]
        return max(self.sizes.slots(row, place.method.cache) for row in rows)

    def best_single(self, setting: Setting, entries: int) -> Place | None:
        """The policy that is best on its own: with a float cache and the modules that ship."""
        there = [p for p in self.places(setting) if p.entries == entries and p.method.single]
        return max(there, key=lambda place: self.score(place).mean, default=None)

    def differences(self, setting: Setting) -> Iterator[Difference]:
        """int8 minus float of each policy, and every method minus the best and the named one."""
        places = [place for place in self.places(setting) if place.method.budgeted]
        named = {p.entries: p for p in places if p.method.label == self.config.against}
        floats = {_twin(p): p for p in places if p.method.cache == "float"}
        pairs = [(OVER_FLOAT, p, floats.get(_twin(p))) for p in places]
        pairs += [(OVER_SINGLE, p, self.best_single(setting, p.entries)) for p in places]
        pairs += [(f"minus {self.config.against}", p, named.get(p.entries)) for p in places]
        for kind, first, second in pairs:
            if second is not None and first != second:
                yield from self._difference(kind, first, second)

    def _difference(self, kind: str, first: Place, second: Place) -> Iterator[Difference]:
        """The difference, unless a task has no pairs of which an interval could be told."""
        tasks = {}
        for task in self.tasks(first.setting):
            theirs = {row["id"]: row["score"] for row in self._rows[second, task]}
            tasks[task] = difference(self._rows[first, task], theirs)
        found = {task: stat for task, stat in tasks.items() if stat is not None}
        if len(found) == len(tasks):
            yield Difference(kind, first, second, average(list(found.values()), -1.0), found)


def _is_asked(cell: GridCell, config: FrontierConfig) -> bool:
    """Whether the model, the task and the way of decoding are those of the frontier."""
    decoded = (cell.drafter, cell.strategy) == ("none", NONE)
    return decoded and cell.model == config.model and cell.task in config.task_names


def _twin(place: Place) -> tuple:
    """What a place has in common with the one that differs in the type of cache only."""
    return place.method.policy, place.method.modules, place.entries
