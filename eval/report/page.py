"""The report's HTML: sections of charts, the table of all cells, and the data behind the links."""

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.report.charts import Bars, Chart, Heat, bars_svg, chart_svg, heat_svg
from lookahead_jax.eval.report.stats import measures, spread

if TYPE_CHECKING:
    from lookahead_jax.eval.report.figures import Report, Section

LONGEST = 240  # characters of a prediction that the page shows


def drawn(chart: Chart | Heat | Bars) -> str:
    """The chart as SVG."""
    if isinstance(chart, Chart):
        return chart_svg(chart)
    return heat_svg(chart) if isinstance(chart, Heat) else bars_svg(chart)


def section_html(section: "Section") -> str:
    """A section: heading, note, legend, charts."""
    legend = "".join(
        f'<li><i style="background:{color}"></i>{html.escape(name)}</li>'
        for name, color in section.legend
    )
    figures = "".join(
        f"<figure><figcaption>{html.escape(chart.title)}</figcaption>{drawn(chart)}</figure>"
        for chart in section.charts
    )
    note = f'<p class="note">{html.escape(section.note)}</p>' if section.note else ""
    names = f'<ul class="legend">{legend}</ul>' if legend else ""
    heading = html.escape(section.title)
    return (
        f'<section class="card"><h3>{heading}</h3>{note}{names}'
        f'<div class="charts">{figures}</div></section>'
    )


def megabytes(count: int | None) -> str:
    """Bytes for people."""
    return "–" if count is None else f"{count / 1e6:,.1f}"


def _cell_row(report: "Report", cell: GridCell) -> str:
    rows = report.cells[cell]
    stat = report.stats.get(cell)
    score = "–" if stat is None else f"{stat.mean:.3f}"
    interval = "" if stat is None else f"{stat.low:.2f}–{stat.high:.2f}"
    batches = {row["first_of_batch"]: row for row in rows}.values()
    ttft = spread([row["ttft_s"] for row in batches])
    first = "–" if ttft is None else f"{1000 * ttft.mean:.1f}"
    between = "" if ttft is None or ttft.n < 2 else f"{1000 * ttft.low:.1f}–{1000 * ttft.high:.1f}"
    added = spread(report.overheads(cell))
    share = "" if added is None else f"{added.mean:+.1%}"
    if added is not None and added.n > 1:
        share += f" ({added.low:+.1%} to {added.high:+.1%})"
    peaks = [row["peak_bytes"] for row in batches if row["peak_bytes"] is not None]
    bound = "≤ " if any(row["peak_is_bound"] for row in batches) else ""
    peak = bound + megabytes(max(peaks)) if peaks else "–"
    beside = "<br>".join(
        f"{html.escape(name)} {found.mean:.3f} ({found.low:.2f}–{found.high:.2f})"
        for name, found in measures(rows).items()
    )
    values = [
        cell.model.rstrip("/").rsplit("/", 1)[-1], cell.task, cell.length, cell.protocol,
        cell.policy, cell.budget or "all", cell.drafter,
    ]  # fmt: skip
    names = "".join(f"<td>{html.escape(str(v))}</td>" for v in values)
    href = report.href([cell])
    numbers = "".join(
        f'<td class="n"><a href="{href}">{value}</a></td>'
        for value in (
            score, interval, beside, len(rows), first, between, share,
            megabytes(rows[0]["cache_bytes"]), peak,
        )
    )  # fmt: skip
    return f"<tr>{names}{numbers}</tr>"


def cells_html(report: "Report") -> str:
    """Every cell with its numbers; each score opens its rows."""
    heads = (
        "model", "task", "tokens", "question", "policy", "kept", "drafter", "score", "95 %",
        "beside it", "n",
        "ms to first token", "95 %", "added to full", "cache MB", "peak MB",
    )  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(_cell_row(report, cell) for cell in report.cells)
    return (
        "<h2>All cells</h2>"
        '<section class="card wide"><p class="note">Time to the first token is that of a whole '
        "batch; what is added to the full cache's is the mean over batches. Peak: resident memory "
        "of the process on a CPU, the allocator's high-water mark on an accelerator.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "</section>"
    )


def data(report: "Report", most: int) -> Mapping[str, Any]:
    """What the page's script shows on demand."""
    cells = []
    for cell, rows in report.cells.items():
        shown = [
            [
                row["id"], row["score"], _cut(row["predicted_answer"]),
                _cut(" | ".join(row["answer"])), _cut(row["question"]), row["prompt_tokens"],
                row["new_tokens"], round(row["ttft_s"], 4), row["line"], row.get("depth"),
                row.get("measures", {}),
            ]
            for row in rows[:most]
        ]  # fmt: skip
        name = f"{cell.task}, {cell.length} tokens, question {cell.protocol}, {cell.policy}"
        kept = f", {cell.budget} kept" if cell.budget else ""
        drafter = "" if cell.drafter == "none" else f", drafter {cell.drafter}"
        cells.append(
            {
                "name": f"{name}{kept}{drafter}", "file": rows[0]["file"], "total": len(rows),
                "rows": shown,
            }
        )  # fmt: skip
    return {"cells": cells, "views": [_view(view) for view in report.views]}


def _view(view: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "group": f"{view['task']}, {view['length']} tokens, question {view['protocol']}, "
        f"example {view['id']}",
        "name": f"{view['policy']}, {view['budget']} kept",
        "pieces": view["pieces"],
        "kept": view["kept"],
        "answer": " | ".join(view["answer"]),
        "predicted": _cut(view["predicted_answer"]),
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
