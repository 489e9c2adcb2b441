"""The results of a frontier as tables, for Markdown and HTML, and as JSON."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lookahead_jax.eval.frontier.results import Difference, Frontier, Place, Setting
from lookahead_jax.eval.report.figures import PROTOCOLS
from lookahead_jax.eval.report.stats import Stat

MEAN = "mean of the tasks"


class Table(NamedTuple):
    """A table with a title; every row begins with a name."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table after its title."""
        marks = "|---" * len(self.heads) + "|"
        body = [f"| {' | '.join(row)} |" for row in (self.heads, *self.rows)]
        return "\n".join([f"{self.title}:\n", body[0], marks, *body[1:]]) + "\n"


def setting_name(setting: Setting) -> str:
    """A setting in words."""
    return f"{setting.length} tokens, {PROTOCOLS[setting.protocol]}"


def tables(frontier: Frontier, setting: Setting) -> list[Table]:
    """Scores of the mean and of each task, differences, and what the methods cost."""
    tasks = frontier.tasks(setting)
    parts: list[tuple[str, str | None]] = [(MEAN, None), *((task, task) for task in tasks)]
    made = [
        _by_bytes(frontier, setting, title, lambda p, task=task: _text(frontier.score(p, task)))
        for title, task in parts
    ]
    made += _differences(frontier, setting)
    costs = "time added to the full cache's first token; slots per layer and KV head"
    return [*made, _by_bytes(frontier, setting, costs, lambda p: _cost(frontier, p))]


def _by_bytes(
    frontier: Frontier, setting: Setting, title: str, shown: Callable[[Place], str]
) -> Table:
    """A row for each method and a column for each number of bytes."""
    entries, sizes = sorted(frontier.config.entries), frontier.sizes
    heads = ["method"]
    for n in entries:
        kept = [f"{sizes.kept(n, cache)} {cache}" for cache in frontier.config.caches]
        heads.append(f"{sizes.budget(n):,} bytes ({', '.join(kept)})")
    places = frontier.places(setting)
    rows = []
    for method in dict.fromkeys(place.method for place in places):
        own = {place.entries: shown(place) for place in places if place.method == method}
        rows.append([method.label, *(own.get(n if method.budgeted else 0, "") for n in entries)])
    return Table(title, heads, rows)


def _differences(frontier: Frontier, setting: Setting) -> list[Table]:
    """A table for each kind of difference."""
    found = list(frontier.differences(setting))
    tasks = frontier.tasks(setting)
    made = []
    for kind in dict.fromkeys(difference.kind for difference in found):
        heads = ["method", "minus", "bytes", MEAN, *tasks]
        rows = [
            [
                d.first.method.label, d.second.method.label,
                f"{frontier.sizes.budget(d.first.entries):,}", _signed(d.mean),
                *(_signed(d.tasks[task]) for task in tasks),
            ]
            for d in found
            if d.kind == kind
        ]  # fmt: skip
        made.append(Table(f"{kind}, at equal bytes on the same examples", heads, rows))
    return made


def numbers(frontier: Frontier) -> dict[str, Any]:
    """Everything as JSON."""
    config, sizes = frontier.config, frontier.sizes
    return {
        "model": config.model,
        "entry_bytes": dict(sizes.entry),
        "budgets": [
            {
                "entries": n, "bytes": sizes.budget(n),
                "kept": {cache: sizes.kept(n, cache) for cache in config.caches},
            }
            for n in sorted(config.entries)
        ],
        "settings": [
            setting._asdict()
            | {
                "tasks": frontier.tasks(setting),
                "points": [_point(frontier, place) for place in frontier.places(setting)],
                "differences": [_difference(d) for d in frontier.differences(setting)],
            }
            for setting in frontier.settings
        ],
    }  # fmt: skip


def _point(frontier: Frontier, place: Place) -> dict[str, Any]:
    method, added = place.method, frontier.added_time(place)
    by_task = {task: frontier.score(place, task) for task in frontier.tasks(place.setting)}
    return {
        "method": method.label, "policy": method.policy, "cache": method.cache,
        "modules": None if method.modules is None else str(method.modules),
        "entries": place.entries, "bytes": frontier.sizes.budget(place.entries) or None,
        "kept": frontier.sizes.kept(place.entries, method.cache) or None,
        "slots": frontier.slots(place), "mean": _rounded(frontier.score(place)),
        "tasks": {task: _rounded(stat) for task, stat in by_task.items()},
        "n": {task: stat.n for task, stat in by_task.items()},
        "added_time": None if added is None else _rounded(added),
    }  # fmt: skip


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        "kind": difference.kind, "method": difference.first.method.label,
        "minus": difference.second.method.label, "entries": difference.first.entries,
        "mean": _rounded(difference.mean),
        "tasks": {task: _rounded(stat) for task, stat in difference.tasks.items()},
        "n": {task: stat.n for task, stat in difference.tasks.items()},
    }  # fmt: skip


def _cost(frontier: Frontier, place: Place) -> str:
    added, slots = frontier.added_time(place), frontier.slots(place)
    if added is None:
        return f"{slots} slots"
    interval = f" ({added.low:+.0%} to {added.high:+.0%})" if added.n > 1 else ""
    return f"{added.mean:+.0%}{interval}; {slots} slots"


def _text(stat: Stat) -> str:
    return f"{stat.mean:.2f} ({stat.low:.2f} to {stat.high:.2f})"


def _signed(stat: Stat) -> str:
    return f"{stat.mean:+.2f} ({stat.low:+.2f} to {stat.high:+.2f})"


def _rounded(stat: Stat) -> list[float]:
    return [round(value, 4) for value in stat[:3]]
