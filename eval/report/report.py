"""Runs -> a page with charts of accuracy, time and memory, and intervals for each number.

    python -m lookahead_jax.eval.report RUN... [--out DIR]

Writes report.html (one file, which needs no network), cells.json with the numbers of every cell,
PNG files of the charts, and strategies.md and strategies.json for runs with strategies, to DIR, or
to the first RUN. Every number of the page opens the rows
behind it. Needs matplotlib (extra `report`).
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import tyro
from markupsafe import Markup

from lookahead_jax.eval.report import drawing, page, strategies
from lookahead_jax.eval.report.cells import Report
from lookahead_jax.eval.report.figures import sections
from lookahead_jax.host.command import run_command
from lookahead_jax.host.files import atomic_path, atomic_write
from lookahead_jax.host.pages import embed_json, render_page

PROG = "lookahead eval report"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a page with the tables and charts of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """Folder of the report. Default: the first run."""
    rows: int = 100
    """Rows per cell that the page shows; the run's files have all of them."""


def write(config: ReportConfig) -> list[Path]:
    """Writes the page, the numbers and the PNG files; returns their paths.

    Raises ModuleNotFoundError without matplotlib, ValueError for folders without rows.
    """
    if not config.runs:
        raise ValueError("no runs to report: give the folder of at least one")
    drawing.require_matplotlib()
    report = Report(config.runs)
    out = config.out or config.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    groups = [*sections(report), *strategies.strategy_sections(report)]
    content = render_page(
        "lookahead_jax.eval.report",
        "report.html",
        groups=groups,
        drawn=lambda chart: Markup(drawing.svg(chart)),
        heads=(*page.NAMES, *page.NUMBERS),
        table=page.table_rows(report),
        data=embed_json(page.data(report, config.rows)),
    )
    atomic_write(out / "report.html", content)
    atomic_write(out / "cells.json", json.dumps(report.numbers(), indent=0) + "\n")
    written = [out / "report.html", out / "cells.json"]
    if compared := strategies.table(report):
        written += [out / "strategies.md", out / "strategies.json"]
        atomic_write(written[-2], compared)
        atomic_write(written[-1], json.dumps(strategies.numbers(report), indent=0) + "\n")
    for heading, members in groups:
        for section in members:
            name = re.sub(r"[^a-z0-9]+", "-", f"{heading} {section.title}".lower()).strip("-")
            path = out / f"{name}.png"
            with atomic_path(path) as temporary:
                drawing.save_png(temporary, f"{heading}\n{section.title}", section.charts)
            written.append(path)
    return written


def main(args: Sequence[str] | None = None) -> int:
    """The command line; a failure is one line on stderr."""
    return run_command(
        lambda: tyro.cli(ReportConfig, prog=PROG, args=args),
        lambda config: print(*write(config), sep="\n"),
        prog=PROG,
    )
