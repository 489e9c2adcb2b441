"""The evaluation's demonstration: a grid of answers, a smaller one of times, and their report.

The answers do not depend on what else the machine does, the times do: run these on a quiet one.

    python benchmarks/evaluation.py --work DIR --steps answers
    python benchmarks/evaluation.py --work DIR --steps times report

A step goes on where it was stopped; take a new DIR when the model or its modules have changed. The
last step writes DIR/report and renews evaluation_embedded.json, evaluation_embedded_times.json and
the rows of both in benchmarks/results, and the pictures of docs/images.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lookahead_jax.eval.grid.config import parse_run
from lookahead_jax.eval.grid.rows import ROWS
from lookahead_jax.eval.grid.run import run
from lookahead_jax.eval.report import report
from lookahead_jax.eval.report.cells import Report
from lookahead_jax.host.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"answers": "embedded", "times": "embedded_times"}
SEEN, HIDDEN = (f"embedded-question-{p}-during-compression" for p in ("seen", "hidden"))
PICTURES = {
    "evaluation-seen-512": f"{SEEN}-accuracy-over-budget-512-tokens",
    "evaluation-hidden-512": f"{HIDDEN}-accuracy-over-budget-512-tokens",
    "evaluation-time": f"{SEEN}-accuracy-over-time-to-the-first-token",
}


def keep(work: Path, results: Path, images: Path) -> None:
    """Keeps the numbers of both runs, the rows behind them, and the report's pictures."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {
        "commit": commit,
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "jax": jax.__version__,
    }
    for step, cells, name in (("answers", "", "_rows"), ("times", "_times", "_times")):
        content = about | {"cells": Report((work / step,)).numbers()}
        path = results / f"evaluation_embedded{cells}.json"
        atomic_write(path, json.dumps(content, indent=0) + "\n")
        rows = gzip.compress((work / step / ROWS).read_bytes(), 9, mtime=0)
        atomic_write(results / f"evaluation_embedded{name}.jsonl.gz", rows)
    for name, source in PICTURES.items():
        shutil.copyfile(work / "report" / f"{source}.png", images / f"{name}.png")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", nargs="+", default=[*CONFIGS, "report"])
    parser.add_argument("--count", help="examples of each task, to try things out")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    if unknown := set(options.steps) - {*CONFIGS, "report"}:
        parser.error(f"unknown steps: {', '.join(sorted(unknown))}")
    for step, config in CONFIGS.items():
        if step in options.steps:
            fewer = [] if options.count is None else ["--count", options.count]
            run(parse_run([config, "--out", str(options.work / step), *fewer]))
    if "report" in options.steps:
        runs = tuple(options.work / step for step in CONFIGS)
        for path in report.write(report.ReportConfig(runs=runs, out=options.work / "report")):
            print(path)
        keep(options.work, options.results, options.images)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
