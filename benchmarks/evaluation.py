"""The evaluation's demonstration: a grid of answers, a smaller one of times, and their report.

Times depend on other load of the machine, answers do not: measure times on an idle machine.

    python benchmarks/evaluation.py --work DIR --steps answers
    python benchmarks/evaluation.py --work DIR --steps times report

A stopped step resumes; use a new DIR when the model or its modules have changed. The last step
writes DIR/report and renews evaluation_embedded.json, evaluation_embedded_times.json and the rows
of both in benchmarks/results, and the pictures of docs/images.
"""

import dataclasses
import gzip
import shutil
from pathlib import Path
from typing import Annotated

import jax
from common import RESULTS, ROOT, Help, commit, machine, parse, save

from lookahead_jax.eval.grid.config import PROG, parse_run
from lookahead_jax.eval.grid.rows import ROWS
from lookahead_jax.eval.grid.run import run
from lookahead_jax.eval.report import report
from lookahead_jax.eval.report.cells import Report
from lookahead_jax.host.files import atomic_write

CONFIGS = {"answers": "embedded", "times": "embedded_times"}
STEPS = (*CONFIGS, "report")
SEEN, HIDDEN = (f"embedded-question-{p}-during-compression" for p in ("seen", "hidden"))
PICTURES = {
    "evaluation-seen-512": f"{SEEN}-accuracy-over-budget-512-tokens",
    "evaluation-hidden-512": f"{HIDDEN}-accuracy-over-budget-512-tokens",
    "evaluation-time": f"{SEEN}-accuracy-over-time-to-the-first-token",
}


def keep(work: Path, results: Path, images: Path) -> None:
    """Keeps the numbers of both runs, the rows behind them, and the report's pictures."""
    about = {
        "commit": commit(short=False),
        "machine": machine(),
        "jax": jax.__version__,
    }
    for step, cells, name in (("answers", "", "_rows"), ("times", "_times", "_times")):
        content = about | {"cells": Report((work / step,)).numbers()}
        save(results / f"evaluation_embedded{cells}.json", content, indent=0)
        rows = gzip.compress((work / step / ROWS).read_bytes(), 9, mtime=0)
        atomic_write(results / f"evaluation_embedded{name}.jsonl.gz", rows)
    for name, source in PICTURES.items():
        shutil.copyfile(work / "report" / f"{source}.png", images / f"{name}.png")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    work: Annotated[Path, Help("folder of the runs")]
    steps: Annotated[tuple[str, ...], Help("steps to run", STEPS)] = STEPS
    count: Annotated[str | None, Help("examples of each task, to try things out")] = None
    results: Annotated[Path, Help("folder of the figures that are kept")] = RESULTS
    images: Annotated[Path, Help("folder of the pictures that are kept")] = ROOT / "docs" / "images"


def main() -> None:
    """The command line."""
    options = parse(Options, __doc__)
    for step, config in CONFIGS.items():
        if step in options.steps:
            fewer = [] if options.count is None else ["--count", options.count]
            run(parse_run([config, "--out", str(options.work / step), *fewer], PROG))
    if "report" in options.steps:
        runs = tuple(options.work / step for step in CONFIGS)
        for path in report.write(report.ReportConfig(runs=runs, out=options.work / "report")):
            print(path)
        keep(options.work, options.results, options.images)


if __name__ == "__main__":
    main()
