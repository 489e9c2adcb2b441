"""Answers at equal bytes: policies, types of cache and lookahead modules on the same examples.

    lookahead eval frontier [CONFIG] --out RUN [options]

Runs a grid for each type of cache and folder of modules, in a folder of its own below RUN, and
writes to RUN the tables frontier.md, the numbers frontier.json, the page frontier.html and a
PNG file for each task and for their mean. The same command resumes a run. Needs matplotlib (extra
`report`).
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from lookahead_jax.eval.frontier.config import PROG, CacheName, FrontierConfig, parse
from lookahead_jax.eval.frontier.figures import figures
from lookahead_jax.eval.frontier.results import Frontier, Grids
from lookahead_jax.eval.frontier.sizes import CacheSizes, sizes_of
from lookahead_jax.eval.frontier.tables import numbers, setting_name, tables
from lookahead_jax.eval.grid.config import RunConfig
from lookahead_jax.eval.grid.run import run as run_grid
from lookahead_jax.eval.report import drawing
from lookahead_jax.eval.report.cells import model_name
from lookahead_jax.host.command import run_command
from lookahead_jax.host.files import atomic_path, atomic_write
from lookahead_jax.host.pages import render_page

NOTE = (
    "Bytes are those of the kept entries of one layer and KV head: keys, values, scales and "
    "positions. Slots are what was allocated for a head, those for the answer included; policies "
    "that share a budget unevenly among heads or layers need more slots than they keep entries. "
    "Intervals are 95 %. Every mean weighs the tasks equally. The best single policy is chosen on "
    "the same examples, which favours it."
)


def run(config: FrontierConfig) -> None:
    """Answers what the run lacks, writes the results and prints the tables.

    Raises ModuleNotFoundError without matplotlib, and errors as `lookahead eval run`.
    """
    drawing.require_matplotlib()
    print(f"{PROG}: loading the model", file=sys.stderr, flush=True)
    sizes = sizes_of(config.model, config.dtype)
    grids: dict[tuple[CacheName, Path | None], Path] = {}
    for method in config.methods:
        if (method.cache, method.modules) not in grids:
            grid = _grid(config, sizes, method.cache, method.modules)
            print(f"{PROG}: {grid.out}", file=sys.stderr, flush=True)
            run_grid(grid)
            grids[method.cache, method.modules] = grid.out
    print(write(config, sizes, grids), end="")


def _grid(
    config: FrontierConfig, sizes: CacheSizes, cache: CacheName, modules: Path | None
) -> RunConfig:
    """The grid of one type of cache and one folder of modules."""
    own = [m.policy for m in config.methods if (m.cache, m.modules) == (cache, modules)]
    return RunConfig(
        out=config.out / (cache if modules is None else f"{cache}-{modules.name}"),
        models=(config.model,), policies=tuple(own), tasks=config.tasks, lengths=config.lengths,
        budgets=tuple(sizes.kept(entries, cache) for entries in config.entries),
        protocols=config.protocols, count=config.count, seed=config.seed, batch=config.batch,
        data=config.data, lookahead=modules, max_new_tokens=config.max_new_tokens,
        dtype=config.dtype, cache_dtype=None if cache == "float" else cache,
        pair_times=config.pair_times, views=0,
    )  # fmt: skip


def write(config: FrontierConfig, sizes: CacheSizes, grids: Grids) -> str:
    """Writes the results of finished grids to the run's folder; returns the Markdown."""
    frontier = Frontier(config, sizes, grids)
    for setting in frontier.unanswered:
        print(f"notice: no answers for {setting_name(setting)}", file=sys.stderr)
    by_setting = [(setting_name(s), tables(frontier, s)) for s in frontier.settings]
    parts = [f"## {name}\n\n" + "\n".join(t.markdown() for t in made) for name, made in by_setting]
    text = "\n".join([f"# {model_name(config.model)}: answers at equal bytes\n\n{NOTE}\n", *parts])
    drawn = list(figures(frontier))
    content = render_page(
        "lookahead_jax.eval.frontier",
        "frontier.html",
        model=model_name(config.model),
        note=NOTE,
        figures=drawn,
        drawn=lambda chart: Markup(drawing.svg(chart)),
        settings=by_setting,
    )
    atomic_write(config.out / "frontier.md", text)
    atomic_write(config.out / "frontier.json", json.dumps(numbers(frontier), indent=1) + "\n")
    atomic_write(config.out / "frontier.html", content)
    for title, charts in drawn:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        with atomic_path(config.out / f"frontier-{name}.png") as temporary:
            drawing.save_png(temporary, f"{model_name(config.model)}: {title}", charts)
    return text


def main(args: Sequence[str] | None = None) -> int:
    """The command line; a failure is one line on stderr."""
    given = list(sys.argv[1:] if args is None else args)
    return run_command(lambda: parse(given), run, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
