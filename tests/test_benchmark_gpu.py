"""benchmarks/gpu.py at toy sizes: every section makes its measurements on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = [
    "ceilings",
    "scores",
    "attention",
    "ttft",
    "decode",
    "steps",
    "memory",
    "train",
    "drafting",
    "peer",
]


@pytest.mark.slow
def test_every_section_runs_at_toy_sizes():
    unset = ("XLA_FLAGS",)
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is most of the time
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--smoke"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if " {" in line]
    found = {section: [] for section in SECTIONS}
    for line in lines:
        found[line.split()[0]].append(json.loads(line[line.index("{") :]))
    assert all(found.values()), {name for name, rows in found.items() if not rows}
    assert all(row["relative_error"] < 0.02 for row in found["scores"] + found["attention"])
    assert all(row["ms"] > 0 for row in found["decode"] + found["steps"])
    assert "not run" in found["peer"][0]["row"]
