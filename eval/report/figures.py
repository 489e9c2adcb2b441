"""The sections of a report: charts over budget, time, length and depth, and of drafting."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.report.cells import Report, described, distinct, model_name
from lookahead_jax.eval.report.charts import (
    PALETTE,
    AnyChart,
    Bars,
    Chart,
    Heat,
    HeatCell,
    Point,
    Series,
)
from lookahead_jax.eval.report.stats import Stat, accuracy, spread

PROTOCOLS = {
    "seen": "question seen during compression",
    "hidden": "question hidden during compression",
}
TIME_NOTE = (
    "Mean of the tasks. Times are measured in the same run as the answers. With paired times, "
    "every batch is also read with the full cache, right before or after; the point of the full "
    "cache then shows the error of the measurement. Without, times are compared with the full "
    "cache's own rows and drift with the load of the machine."
)
DRAFTING_NOTE = (
    "The mean of the batches, with its interval. A last batch that was filled up with copies of "
    "its rows counts the copies, too."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A heading of the page with its charts."""

    title: str
    charts: Sequence[AnyChart]
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()


def sections(report: Report) -> Iterator[tuple[str, list[Section]]]:
    """Headings with their sections, one per model and protocol."""
    for model in distinct("model", list(report.cells)):
        every = [c for c in report.cells if c.model == model]
        for protocol in distinct("protocol", every):
            cells = report.select(model=model, protocol=protocol)
            made = [
                *_over_budget(report, cells),
                _over_time(report, cells),
                _by_length(report, cells),
                _by_depth(report, cells),
            ]
            if drawn := [section for section in made if section is not None]:
                yield f"{model_name(model)}: {PROTOCOLS[protocol]}", drawn
        if (drafting := _drafting(report, model)) is not None:
            yield f"{model}: drafting", [drafting]


def _over_budget(report: Report, every: Sequence[GridCell]) -> Iterator[Section]:
    """Accuracy over budget: the mean of the tasks, then each task."""
    for length in distinct("length", every):
        cells = [c for c in every if c.length == length]
        tasks = distinct("task", [c for c in cells if c in report.stats])
        budgets = [float(budget) for budget in distinct("budget", cells) if budget]
        parts = [("mean of the tasks", tasks)] * (len(tasks) > 1) + [(t, [t]) for t in tasks]
        drawn = [
            Chart(
                title=title,
                x_label="entries kept per layer and head",
                series=[
                    _series(report, policy, [c for c in cells if c.task in part])
                    for policy in distinct("policy", cells)
                ],
                log=True,
                ticks=budgets,
            )
            for title, part in parts
        ]
        if drawn:
            title = f"Accuracy over budget, {length} tokens"
            yield Section(title=title, charts=drawn, legend=report.legend(cells))


def _series(report: Report, policy: str, every: Sequence[GridCell]) -> Series:
    """A policy's accuracy over budget; a line across the chart if it has no budget."""
    cells = [c for c in every if c.policy == policy]
    points = []
    for budget in distinct("budget", cells):
        group = [c for c in cells if c.budget == budget]
        if (stat := report.mean(group)) is not None:
            note = f"{policy}, budget {budget}: {described(stat)}"
            points.append(Point(float(budget), *stat[:3], report.href(group), note))
    across = all(c.budget == 0 for c in cells)
    return Series(policy, report.colors[policy], points, across=across)


def _over_time(report: Report, every: Sequence[GridCell]) -> Section | None:
    """Accuracy over what a policy adds to the time to the first token."""
    budgets = [budget for budget in distinct("budget", every) if budget]
    drawn = []
    for length, budget in itertools.product(distinct("length", every), budgets):
        series = []
        for policy in distinct("policy", every):
            cells = _at(every, policy, length, budget)
            cost = spread([share for c in cells for share in report.overheads(c)])
            stat = report.mean(cells)
            if stat is None or cost is None:
                continue
            note = (
                f"{policy}: {described(stat)}; time to the first token {cost.mean:+.0%} "
                f"({cost.low:+.0%} to {cost.high:+.0%}) over {cost.n} batches"
            )
            x, low, high = (100 * value for value in cost[:3])
            point = Point(x, *stat[:3], report.href(cells), note, low, high)
            series.append(Series(policy, report.colors[policy], [point], joined=False))
        if series:
            label = "% added to the full cache's time to first token"
            title = f"{length} tokens, {budget} kept"
            drawn.append(Chart(title=title, x_label=label, series=series))
    if not drawn:
        return None
    title, legend = "Accuracy over time to the first token", report.legend(every)
    return Section(title=title, charts=drawn, note=TIME_NOTE, legend=legend)


def _at(cells: Sequence[GridCell], policy: str, length: int, budget: int) -> list[GridCell]:
    """Cells of a policy at a length and a budget, or without a budget."""
    of_policy = [c for c in cells if (c.policy, c.length) == (policy, length)]
    return [c for c in of_policy if c.budget in (0, budget)]


def _by_length(report: Report, every: Sequence[GridCell]) -> Section | None:
    """Policy x length, the mean of the tasks."""
    lengths, policies = distinct("length", every), distinct("policy", every)
    drawn = []
    for budget in [budget for budget in distinct("budget", every) if budget]:
        fields = [
            [
                _field(
                    report.mean(cells := _at(every, policy, length, budget)),
                    report.href(cells),
                    f"{policy}, {length} tokens",
                )
                for length in lengths
            ]
            for policy in policies
        ]
        if any(field for row in fields for field in row):
            drawn.append(
                Heat(
                    title=f"{budget} kept",
                    x_label="tokens",
                    y_label="policy",
                    columns=[str(length) for length in lengths],
                    rows=[short(policy) for policy in policies],
                    fields=fields,
                )
            )
    note = "Mean of the tasks. The tooltip of a field has its interval."
    return Section(title="Length and policy", charts=drawn, note=note) if drawn else None


def _field(stat: Stat | None, href: str, label: str) -> HeatCell | None:
    if stat is None:
        return None
    return HeatCell(stat.mean, f"{stat.mean:.2f}", href, f"{label}: {described(stat)}")


def _by_depth(report: Report, every: Sequence[GridCell]) -> Section | None:
    """Depth x length for every task that hides one thing at a depth."""
    deep = [c for c in every if any("depth" in row for row in report.cells[c])]
    drawn = []
    for task, policy, budget in dict.fromkeys((c.task, c.policy, c.budget) for c in deep):
        cells = [c for c in deep if (c.task, c.policy, c.budget) == (task, policy, budget)]
        depths = sorted({row["depth"] for c in cells for row in report.cells[c]})
        fields = [
            [
                _field(
                    accuracy([row for row in report.cells[c] if row["depth"] == depth]),
                    f"{report.href([c])}&depth={depth}",
                    f"depth {depth} %",
                )
                for c in cells
            ]
            for depth in depths
        ]
        drawn.append(
            Heat(
                title=f"{task}: {short(policy)}" + (f", {budget} kept" if budget else ""),
                x_label="tokens",
                y_label="depth",
                columns=[str(c.length) for c in cells],
                rows=[f"{depth} %" for depth in depths],
                fields=fields,
            )
        )
    note = "Each field has few examples: its tooltip shows n and the interval."
    return Section(title="Needles by depth and length", charts=drawn, note=note) if drawn else None


def _drafting(report: Report, model: str) -> Section | None:
    """Tokens per step of every drafter, over all cells of a model."""
    drawn = []
    every = [c for c in report.cells if c.model == model and c.drafter != "none"]
    for drafter in distinct("drafter", every):
        cells = [c for c in every if c.drafter == drafter]
        histograms = [
            row["draft_lengths"]
            for cell in cells
            for row in {row["first_of_batch"]: row for row in report.cells[cell]}.values()
        ]
        counts: Counter[int] = Counter()
        for steps in histograms:
            counts.update({i: count for i, count in enumerate(steps, 1) if count})
        total = counts.total()
        mean = spread(
            [sum(i * n for i, n in enumerate(h, 1)) / sum(h) for h in histograms if sum(h)]
        )
        if mean is None:
            continue
        interval = f"{mean.mean:.2f} ({mean.low:.2f} to {mean.high:.2f})"
        drawn.append(
            Bars(
                title=f"{drafter}: {interval} tokens per step, {total} steps",
                x_label="tokens emitted by a step",
                shares=[counts[i] / total for i in range(1, max(counts) + 1)],
                color=PALETTE[len(drawn) % len(PALETTE)],
                href=report.href(cells),
            )
        )
    return Section(title="Drafting", charts=drawn, note=DRAFTING_NOTE) if drawn else None


def short(policy: str) -> str:
    """The name of a policy without its settings."""
    return policy.partition(":")[0]
