"""Cells of a comparison -> means with 95 % intervals, verdicts, and Markdown tables.

The score of a cell is the share of exact answers. For code, where the model's own continuation is
the answer, it is the share of tokens before the first that differs. Seeds of the modules are
averaged per prompt, so that an interval counts prompts, not prompts times seeds.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lookahead_jax.eval.compare.methods import DRAFT_FREE, LOOKAHEAD, ORACLE
from lookahead_jax.eval.intervals import of_mean, of_share
from lookahead_jax.eval.tasks.own.code import CODE
from lookahead_jax.host.files import atomic_write, load_arrays

MEASURES = ("score", "kl", "recall")
RESAMPLES = 2000
LEAST_GAP = 0.02  # of scores; shares of a smaller gap are noise

Cells = dict[str, dict[str, np.ndarray]]
"""Method -> measure -> [U, N], seeds averaged."""


def read_cells(folder: Path) -> tuple[Cells, np.ndarray, dict[str, int]]:
    """The cells of one task, its budgets, and how many seeds each method had.

    Raises ValueError for a file that is not a cell.
    """
    seeds: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    budgets = np.zeros(0)
    for path in sorted(folder.glob("*.npz")):
        cell = _read_cell(path, ("budgets", "exact", "kl", "followed", "recall"))
        budgets = cell.pop("budgets")
        cell["score"] = cell["followed" if folder.name == CODE else "exact"]
        seeds[path.stem.partition(".")[0]].append(cell)
    cells = {
        name: {m: np.mean([cell[m] for cell in group], axis=0) for m in MEASURES}
        for name, group in seeds.items()
    }
    return cells, budgets, {name: len(group) for name, group in seeds.items()}


def _read_cell(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a cell; ValueError if the file lacks one of `names`, or is damaged."""
    arrays = load_arrays(path)
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{path}: not a cell of a comparison (it has no array {missing[0]!r})")
    return arrays


def best_settings(out: Path) -> dict[str, dict[str, list[int]]]:
    """task -> method -> the number of its best setting at each budget, of cells METHOD.NUMBER.npz.

    The highest score wins; ties go to the smaller divergence from the full cache. Raises ValueError
    for a file that is not such a cell.
    """
    best: dict[str, dict[str, list[int]]] = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        cells: dict[str, dict[int, dict[str, np.ndarray]]] = defaultdict(dict)
        score = "followed" if folder.name == CODE else "exact"
        for path in folder.glob("*.npz"):
            method, _, number = path.stem.rpartition(".")
            if not method or not number.isdigit():
                raise ValueError(f"{path}: not a setting of a comparison (METHOD.NUMBER.npz)")
            cells[method][int(number)] = _read_cell(path, (score, "kl"))
        best[folder.name] = {m: _best(s, score) for m, s in sorted(cells.items())}
    return best


def _best(settings: dict[int, dict[str, np.ndarray]], score: str) -> list[int]:
    budgets = len(next(iter(settings.values()))[score])
    return [
        max(settings, key=lambda n: (settings[n][score][u].mean(), -settings[n]["kl"][u].mean()))
        for u in range(budgets)
    ]


def summarise(cells: Cells, task: str, seeds: dict[str, int]) -> dict[str, Any]:
    """Method -> measure -> one {mean, low, high} per budget."""
    summary: dict[str, Any] = {}
    for method, measures in cells.items():
        summary[method] = {"seeds": seeds[method]}
        for measure, values in measures.items():
            share = measure == "score" and task != CODE
            rows = []
            for row in values:
                low, high = of_share(float(row.mean()), len(row)) if share else of_mean(row)
                rows.append({"mean": float(row.mean()), "low": low, "high": high})
            summary[method][measure] = rows
    return summary


def learned(cells: Cells) -> list[str]:
    """The methods that are trained modules, by their labels."""
    return [name for name in cells if name.startswith(LOOKAHEAD)]


def duel(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Difference of two methods on the same prompts [N], with its 95 % bootstrap interval."""
    difference = ours - theirs
    rng = np.random.default_rng(0)
    means = difference[rng.integers(0, len(difference), (RESAMPLES, len(difference)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}


def verdicts(cells: Cells, budgets: np.ndarray) -> list[dict[str, Any]]:
    """Trained modules against the best policy without a draft, LAQ and the oracle, per budget."""
    lines = []
    for method in learned(cells):
        for u, budget in enumerate(budgets.tolist()):
            score = {name: cells[name]["score"][u] for name in cells}
            free = [name for name in DRAFT_FREE if name in cells]
            rival = max(free, key=lambda name: score[name].mean(), default=None)
            if rival is None:
                continue
            line = {
                "method": method,
                "budget": budget,
                "rival": rival,
                "over_rival": duel(score[method], score[rival]),
            }
            for draft in ("laq", "laq++"):
                if draft in cells:
                    line[f"over_{draft}"] = duel(score[method], score[draft])
            if "snapkv" in cells and ORACLE in cells:
                gap = float(score[ORACLE].mean() - score["snapkv"].mean())
                gain = float(score[method].mean() - score["snapkv"].mean())
                line["gap_closed"] = gain / gap if gap > LEAST_GAP else None
            lines.append(line)
    return lines


def write_summary(out: Path, *, length: int, base: str) -> None:
    """Writes out/summary.json and out/table.md from the cells of all tasks."""
    tasks: dict[str, Any] = {}
    parts = []
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        cells, budgets, seeds = read_cells(folder)
        if not cells:
            continue
        prompts = next(iter(cells.values()))["score"].shape[1]
        tasks[folder.name] = {
            "budgets": budgets.tolist(),
            "prompts": prompts,
            "methods": summarise(cells, folder.name, seeds),
            "verdicts": verdicts(cells, budgets),
        }
        parts.append(_section(folder.name, tasks[folder.name], length))
    content = {"length": length, "base_fingerprint": base, "tasks": tasks}
    atomic_write(out / "summary.json", json.dumps(content, indent=1) + "\n")
    atomic_write(out / "table.md", "\n".join(parts))


def _order(name: str) -> tuple[int, str]:
    first = ["full", ORACLE]
    rank = first.index(name) if name in first else 2 + 2 * (name in DRAFT_FREE)
    rank += name.startswith("laq")
    return rank, name


def _section(task: str, summary: dict[str, Any], length: int) -> str:
    """Scores, divergences and recalls of one task as Markdown tables."""
    titles = {
        "score": "tokens followed" if task == CODE else "exact answers",
        "kl": "KL from the full cache, nats per token",
        "recall": "share of the oracle's entries kept",
    }
    forms: dict[str, Callable[[dict[str, float]], str]] = {
        "score": lambda c: f"{c['mean']:.2f} ({c['low']:.2f}-{c['high']:.2f})",
        "kl": lambda c: f"{c['mean']:.3f}",
        "recall": lambda c: f"{c['mean']:.2f}",
    }
    lines = [f"## {task}: {summary['prompts']} prompts of {length} tokens", ""]
    for measure in MEASURES:
        heads = [f"{b} ({100 * b / length:.1f} %)" for b in summary["budgets"]]
        lines += [
            f"| {titles[measure]} | " + " | ".join(heads) + " |",
            "|---" * (len(heads) + 1) + "|",
        ]
        for name in sorted(summary["methods"], key=_order):
            cells = [forms[measure](cell) for cell in summary["methods"][name][measure]]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
