"""The cells of some runs as charts: over budget, time, length and depth, and of drafting."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.report import charts
from lookahead_jax.eval.report.charts import Bars, Chart, Heat, HeatCell, Line, Point
from lookahead_jax.eval.report.stats import (
    Stat,
    accuracy,
    average,
    measures,
    overhead,
    read_runs,
    read_views,
    spread,
)

PROTOCOLS = {
    "seen": "question seen while the prompt is cut",
    "hidden": "question hidden while the prompt is cut",
}


@dataclasses.dataclass
class Section:
    """A heading of the page with its charts."""

    title: str
    note: str
    charts: list[Chart | Heat | Bars]
    legend: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Report:
    """The cells of some runs, numbered, and the charts that can be made of them."""

    def __init__(self, runs: Sequence[Path]):
        self.cells = read_runs(runs)
        self.views = read_views(runs)
        self.number = {cell: i for i, cell in enumerate(self.cells)}
        policies = dict.fromkeys(c.policy for c in self.cells if c.policy != "full")
        palette = itertools.cycle(charts.PALETTE)
        self.colors = {name: next(palette) for name in policies} | {"full": charts.REFERENCE}
        self.stats = {c: s for c, rows in self.cells.items() if (s := accuracy(rows))}

    def having(self, **fields: Any) -> list[GridCell]:
        """Cells with these fields; of several drafters one, since they do not change answers."""
        found = [c for c in self.cells if all(getattr(c, k) == v for k, v in fields.items())]
        if "drafter" not in fields and found:
            drafters = [c.drafter for c in found]
            one = "none" if "none" in drafters else drafters[0]
            found = [c for c in found if c.drafter == one]
        return found

    def distinct(self, name: str, cells: Sequence[GridCell]) -> list[Any]:
        """The values of a field, in their first order; numbers ascending."""
        values = list(dict.fromkeys(getattr(c, name) for c in cells))
        return sorted(values) if values and isinstance(values[0], int) else values

    def href(self, cells: Sequence[GridCell]) -> str:
        """A link that opens the rows of cells."""
        return "#r=" + ",".join(str(self.number[c]) for c in cells)

    def over(self, cells: Sequence[GridCell]) -> Stat | None:
        """The mean of cells, one per task; None if one has no score."""
        stats = [self.stats[c] for c in cells if c in self.stats]
        return average(stats) if stats and len(stats) == len(cells) else None

    def _line(self, policy: str, cells: Sequence[GridCell], x: str) -> Line:
        points = []
        for value in self.distinct(x, cells):
            group = [c for c in cells if getattr(c, x) == value]
            if (stat := self.over(group)) is not None:
                note = f"{policy}, {x} {value}: {described(stat)}"
                points.append(Point(float(value), *stat[:3], self.href(group), note))
        across = x == "budget" and all(c.budget == 0 for c in cells)
        return Line(policy, self.colors[policy], points, across=across)

    def over_budget(self, model: str, protocol: str) -> Iterator[Section]:
        """Accuracy over budget: the mean of the tasks, then each task."""
        every = self.having(model=model, protocol=protocol)
        for length in self.distinct("length", every):
            cells = [c for c in every if c.length == length]
            tasks = self.distinct("task", [c for c in cells if c in self.stats])
            budgets = [b for b in self.distinct("budget", cells) if b]
            if not tasks:
                continue
            found = []
            for name, part in [("mean of the tasks", tasks)] * (len(tasks) > 1) + [
                (task, [task]) for task in tasks
            ]:
                lines = [
                    self._line(p, [c for c in cells if c.policy == p and c.task in part], "budget")
                    for p in self.distinct("policy", cells)
                ]
                found.append(
                    Chart(
                        title=name, x_label="entries kept per layer and head", lines=lines,
                        log=True, ticks=budgets,
                    )
                )  # fmt: skip
            yield Section(f"Accuracy over budget, {length} tokens", "", found, self.legend(cells))

    def pareto(self, model: str, protocol: str) -> Section | None:
        """Accuracy over what a policy adds to the time to the first token."""
        every = self.having(model=model, protocol=protocol)
        found = []
        for length, budget in itertools.product(
            self.distinct("length", every), [b for b in self.distinct("budget", every) if b]
        ):
            lines = []
            for policy in self.distinct("policy", every):
                cells = self._at(every, policy, length, budget)
                cost = spread([share for c in cells for share in self.overheads(c)])
                stat = self.over(cells)
                if stat is None or cost is None:
                    continue
                note = (
                    f"{policy}: {described(stat)}; time to the first token {cost.mean:+.0%} "
                    f"({cost.low:+.0%} to {cost.high:+.0%}) over {cost.n} batches"
                )
                percent = [100 * v for v in cost[:3]]
                point = Point(percent[0], *stat[:3], self.href(cells), note, percent[1], percent[2])
                lines.append(Line(policy, self.colors[policy], [point], joined=False))
            if lines:
                title = f"{length} tokens, {budget} kept"
                label = "% added to the full cache's time to first token"
                found.append(Chart(title=title, x_label=label, lines=lines))
        note = (
            "Mean of the tasks. The time is measured in the same run as the answers. With paired "
            "times every batch is read with the full cache, too, right before or after, and the "
            "full cache's own point says how far the times can be trusted; without, they are "
            "compared with the full cache's own rows, and drift with the load of the machine."
        )
        title = "Accuracy over time to the first token"
        return Section(title, note, list(found), self.legend(every)) if found else None

    def _at(
        self, cells: Sequence[GridCell], policy: str, length: int, budget: int
    ) -> list[GridCell]:
        found = [c for c in cells if (c.policy, c.length) == (policy, length)]
        return [c for c in found if c.budget in (0, budget)]  # 0: without a budget

    def overheads(self, cell: GridCell) -> list[float]:
        """What each batch of a cell adds to the full cache's time to the first token."""
        full = self.cells.get(cell._replace(policy="full", budget=0), [])
        return overhead(self.cells[cell], full)

    def lengths(self, model: str, protocol: str) -> Section | None:
        """Policy x length, the mean of the tasks."""
        every = self.having(model=model, protocol=protocol)
        across = self.distinct("length", every)
        policies = self.distinct("policy", every)
        found = []
        for budget in [b for b in self.distinct("budget", every) if b]:
            fields = []
            for policy in policies:
                row: list[HeatCell | None] = []
                for length in across:
                    cells = self._at(every, policy, length, budget)
                    row.append(self._field(cells, f"{policy}, {length} tokens"))
                fields.append(row)
            if any(field for row in fields for field in row):
                found.append(
                    Heat(
                        title=f"{budget} kept", x_label="tokens", y_label="policy",
                        columns=[str(n) for n in across],
                        rows=[short(p) for p in policies], fields=fields,
                    )
                )  # fmt: skip
        note = "Mean of the tasks; point at a field for its interval."
        return Section("Length and policy", note, list(found)) if found else None

    def _field(self, cells: Sequence[GridCell], what: str) -> HeatCell | None:
        stat = self.over(cells)
        if stat is None:
            return None
        return HeatCell(
            stat.mean, f"{stat.mean:.2f}", self.href(cells), f"{what}: {described(stat)}"
        )

    def needles(self, model: str, protocol: str) -> Section | None:
        """Depth x length for every task that hides one thing at a depth."""
        every = self.having(model=model, protocol=protocol)
        deep = [c for c in every if any("depth" in row for row in self.cells[c])]
        found = []
        for task, policy, budget in dict.fromkeys((c.task, c.policy, c.budget) for c in deep):
            cells = [c for c in deep if (c.task, c.policy, c.budget) == (task, policy, budget)]
            depths = sorted({row["depth"] for c in cells for row in self.cells[c]})
            fields: list[list[HeatCell | None]] = []
            for depth in depths:
                line: list[HeatCell | None] = []
                for cell in cells:
                    stat = accuracy([r for r in self.cells[cell] if r["depth"] == depth])
                    note = "" if stat is None else f"depth {depth} %: {described(stat)}"
                    line.append(
                        None
                        if stat is None
                        else HeatCell(
                            stat.mean,
                            f"{stat.mean:.2f}",
                            f"{self.href([cell])}&depth={depth}",
                            note,
                        )
                    )
                fields.append(line)
            kept = f", {budget} kept" if budget else ""
            found.append(
                Heat(
                    title=f"{task}: {short(policy)}{kept}", x_label="tokens", y_label="depth",
                    columns=[str(c.length) for c in cells], rows=[f"{d} %" for d in depths],
                    fields=fields,
                )
            )  # fmt: skip
        note = "Few examples stand behind each field: point at it for n and the interval."
        return Section("Needles by depth and length", note, list(found)) if found else None

    def drafting(self, model: str) -> Section | None:
        """Tokens per step of every drafter, over all cells of a model."""
        found: list[Chart | Heat | Bars] = []
        every = [c for c in self.cells if c.model == model and c.drafter != "none"]
        for drafter in self.distinct("drafter", every):
            counts: dict[int, int] = defaultdict(int)
            means = []
            cells = [c for c in every if c.drafter == drafter]
            for cell in cells:
                batches = {row["first_of_batch"]: row for row in self.cells[cell]}
                for row in batches.values():
                    steps = row["draft_lengths"]
                    if sum(steps):
                        means.append(sum((i + 1) * n for i, n in enumerate(steps)) / sum(steps))
                    for i, count in enumerate(steps):
                        counts[i] += count
            total = sum(counts.values())
            if not total:
                continue
            shares = [counts[i] / total for i in range(max(counts) + 1)]
            mean = cast(Stat, spread(means))
            found.append(
                Bars(
                    title=f"{drafter}: {mean.mean:.2f} ({mean.low:.2f} to {mean.high:.2f}) tokens "
                    f"a step, {total} steps",
                    x_label="tokens that a step emitted", shares=shares,
                    color=charts.PALETTE[len(found) % len(charts.PALETTE)], href=self.href(cells),
                )
            )  # fmt: skip
        note = (
            "The mean of the batches, with its interval. A last batch that was filled up with "
            "copies of its rows counts those, too."
        )
        return Section("Drafting", note, found) if found else None

    def numbers(self) -> list[dict[str, Any]]:
        """Every cell with its score, its interval, its times and its sizes."""
        found = []
        for cell, rows in self.cells.items():
            stat = self.stats.get(cell)
            beside = {k: [round(v, 4) for v in s[:3]] for k, s in measures(rows).items()}
            ttft = spread([r["ttft_s"] for r in {r["first_of_batch"]: r for r in rows}.values()])
            added = spread(self.overheads(cell))
            found.append(
                cell._asdict()
                | {"n": len(rows), "score": stat and [round(v, 4) for v in stat[:3]]}
                | ({"measures": beside} if beside else {})
                | {"ttft_s": ttft and [round(v, 4) for v in ttft[:3]]}
                | ({"ttft_overhead": [round(v, 4) for v in added[:3]]} if added else {})
                | {"cache_bytes": rows[0]["cache_bytes"]}
            )
        return found

    def legend(self, cells: Sequence[GridCell]) -> list[tuple[str, str]]:
        """(policy, colour) of everything that is drawn."""
        return [(name, self.colors[name]) for name in self.distinct("policy", cells)]

    def sections(self) -> Iterator[tuple[str, list[Section]]]:
        """Headings with their sections, one per model and protocol."""
        for model in self.distinct("model", list(self.cells)):
            cells = [c for c in self.cells if c.model == model]
            for protocol in self.distinct("protocol", cells):
                found: list[Section | None] = [*self.over_budget(model, protocol)]
                for make in (self.pareto, self.lengths, self.needles):
                    found.append(make(model, protocol))
                name = model.rstrip("/").rsplit("/", 1)[-1]
                yield f"{name}: {PROTOCOLS[protocol]}", [s for s in found if s is not None]
            if (drafting := self.drafting(model)) is not None:
                yield f"{model}: drafting", [drafting]


def described(stat: Stat) -> str:
    """The number as people should read it."""
    return f"{stat.mean:.3f} (95 %: {stat.low:.3f} to {stat.high:.3f}), n = {stat.n}"


def short(policy: str) -> str:
    """The name of a policy without its settings."""
    return policy.partition(":")[0]
