"""Metrics of a training run as JSON lines."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lookahead_jax.host.files import atomic_write

OnMetrics = Callable[[dict[str, Any]], None]


def truncate_log(path: Path, first: int) -> None:
    """Leaves one line for each step before `first`: later steps will be logged again.

    Of several lines of a step, the last one stays. A line that a crash has cut is dropped.
    """
    lines: dict[int, str] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step < first:
            lines[step] = line + "\n"
    atomic_write(path, "".join(lines[step] for step in sorted(lines)))


class MetricsLog:
    """Logs one line per step, on the first process.

    Values stay on the devices until `every` steps are pending, so that no step waits for the host.
    """

    def __init__(
        self,
        path: Path,
        first: int,
        *,
        every: int,
        patience: int,
        on_metrics: OnMetrics | None = None,
    ):
        """Continues the file before step `first`, the first one that will be logged."""
        self._path, self._every, self._patience = path, every, patience
        self._on_metrics = on_metrics
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._since = time.perf_counter()
        if jax.process_index() == 0:
            truncate_log(path, first)

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Adds the scalars of a step, `skipped_in_a_row` among them."""
        self._pending.append((step, values))
        if len(self._pending) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending; FloatingPointError if too many steps in a row were skipped."""
        lines: list[dict[str, Any]] = [
            {"step": step} | {name: value.item() for name, value in values.items()}
            for step, values in self._pending
        ]
        now = time.perf_counter()
        for line in lines:
            line["seconds"] = (now - self._since) / len(lines)
        self._pending, self._since = [], now
        if jax.process_index() == 0:
            with open(self._path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            if self._on_metrics is not None:
                for line in lines:
                    self._on_metrics(line)
        if lines and lines[-1]["skipped_in_a_row"] >= self._patience:
            skipped = lines[-1]["skipped_in_a_row"]
            raise FloatingPointError(f"{skipped} steps in a row without a finite loss and gradient")
