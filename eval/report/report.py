"""Runs -> one page and PNG files: what was kept, what it cost, how sure that is.

    python -m lookahead_jax.eval.report RUN... [--out DIR]

DIR (the first RUN if left out) gets report.html, which needs no network, cells.json with the
numbers of every cell, and PNG files of the charts if matplotlib is there (extra `report`). Every
number of the page opens the rows behind it.
"""

import dataclasses
import html
import json
import re
import sys
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import tyro

from lookahead_jax.eval.report import charts, page
from lookahead_jax.eval.report.figures import Report
from lookahead_jax.host.files import atomic_path, atomic_write
from lookahead_jax.host.pages import embed_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is reported, and where to."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """Folder of the report; left out, the first run."""
    rows: int = 100
    """Rows of a cell that the page holds; all of them stand in the run's files."""


def write(config: ReportConfig) -> list[Path]:
    """Writes the page and its PNG files; returns their paths."""
    report = Report(config.runs)
    out = config.out or config.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    body, written = [], []
    pictures = find_spec("matplotlib") is not None
    for heading, sections in report.sections():
        body.append(f"<h2>{html.escape(heading)}</h2>")
        for section in sections:
            body.append(page.section_html(section))
            if pictures:
                name = re.sub(r"[^a-z0-9]+", "-", f"{heading} {section.title}".lower()).strip("-")
                path = out / f"{name}.png"
                with atomic_path(path) as temporary:
                    charts.save_png(temporary, f"{heading}\n{section.title}", section.charts)
                written.append(path)
    body.append(page.cells_html(report))
    data = page.data(report, config.rows)
    template = (
        files("lookahead_jax.eval.report").joinpath("templates/report.html").read_text("utf-8")
    )
    content = template.replace("__BODY__", "\n".join(body)).replace("__DATA__", embed_json(data))
    atomic_write(out / "report.html", content)
    atomic_write(out / "cells.json", json.dumps(report.numbers(), indent=0) + "\n")
    if not pictures:
        print("no PNG files: they need matplotlib (pip install 'lookahead-jax[report]')")
    return [out / "report.html", out / "cells.json", *written]


def main(args: Sequence[str] | None = None) -> int:
    """The command line; a failure is one line on stderr."""
    config = tyro.cli(ReportConfig, prog="python -m lookahead_jax.eval.report.report", args=args)
    try:
        for path in write(config):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
