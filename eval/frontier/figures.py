"""The charts of a frontier: scores over bytes, the mean of the tasks and each task."""

import itertools
from collections.abc import Iterator, Sequence

from lookahead_jax.eval.frontier.config import FrontierMethod
from lookahead_jax.eval.frontier.results import Frontier, Place, Setting
from lookahead_jax.eval.frontier.tables import MEAN, setting_name
from lookahead_jax.eval.report.cells import described
from lookahead_jax.eval.report.charts import REFERENCE, Chart, Point, Series

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4b94", "#444444")
"""The first six are those of Okabe and Ito (2008), which the colour-blind can tell apart."""
_MARKERS = "os^Dv*Xp"


def figures(frontier: Frontier) -> Iterator[tuple[str, list[Chart]]]:
    """(mean or task, a chart for each setting), where there are answers."""
    tasks = [task for s in frontier.settings for task in frontier.tasks(s)]
    for title in (MEAN, *dict.fromkeys(tasks)):
        charts = [
            _chart(frontier, setting, None if title == MEAN else title)
            for setting in frontier.settings
            if title == MEAN or title in frontier.tasks(setting)
        ]
        yield title, charts


def _chart(frontier: Frontier, setting: Setting, task: str | None) -> Chart:
    places, entries = frontier.places(setting), sorted(frontier.config.entries)
    return Chart(
        title=setting_name(setting),
        x_label=f"kB per layer and KV head ({', '.join(map(str, entries))} float entries)",
        series=[
            _series(frontier, [p for p in places if p.method == method], task)
            for method in _drawn(list(dict.fromkeys(place.method for place in places)))
        ],
        log=True,
        ticks=[_kilobytes(frontier, n) for n in entries],
    )


def _drawn(methods: Sequence[FrontierMethod]) -> list[FrontierMethod]:
    """Of the methods that keep everything, the first only: a line across the chart."""
    whole = [method for method in methods if not method.budgeted]
    return [*whole[:1], *(method for method in methods if method.budgeted)]


def _series(frontier: Frontier, places: Sequence[Place], task: str | None) -> Series:
    """A method: its colour and marker are those of its policy, its line that of its cache."""
    method = places[0].method
    points = []
    for place in places:
        stat = frontier.score(place, task)
        kept = frontier.sizes.kept(place.entries, method.cache)
        note = f"{method.label}, {kept or 'all'} entries: {described(stat)}"
        points.append(Point(_kilobytes(frontier, place.entries), *stat[:3], "#tables", note))
    if not method.budgeted:
        return Series(method.label, REFERENCE, points, across=True)
    color, marker = _look(frontier, method)
    dashed = method.cache != "float"
    return Series(method.label, color, points, marker=marker, dashed=dashed)


def _look(frontier: Frontier, method: FrontierMethod) -> tuple[str, str]:
    """Colour and marker of a policy with its modules."""
    known = [(m.policy, m.modules) for m in frontier.config.methods if m.budgeted]
    looks = itertools.cycle(zip(_COLORS, _MARKERS, strict=True))
    return dict(zip(dict.fromkeys(known), looks, strict=False))[method.policy, method.modules]


def _kilobytes(frontier: Frontier, entries: int) -> float:
    return float(f"{frontier.sizes.budget(entries) / 1000:.3g}")
