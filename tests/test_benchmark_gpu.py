"""benchmarks/gpu.py at toy sizes: every section makes its measurements on any machine."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
assert spec is not None
assert spec.loader is not None
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


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
    found = {section: [] for section in gpu.SECTIONS}
    for line in lines:
        found[line.split()[0]].append(json.loads(line[line.index("{") :]))
    assert all(found.values()), {name for name, rows in found.items() if not rows}
    assert all(row["relative_error"] < 0.02 for row in found["scores"] + found["attention"])
    for name in (
        "decode",
        "compilers",
        "graph",
        "steps",
    ):  # differences of toy times may be anything
        assert all(np.isfinite(row["ms"]) for row in found[name])
    assert set(found["ttft"][0]) == {
        "rounds", "prefill alone", "lookaheadkv", "snapkv", "laq", "wall_s"
    }  # fmt: skip
    assert "added_percent" in found["ttft"][0]["lookaheadkv"]
    assert all("not run" in row.get("row", "") or row["s"] > 0 for row in found["peer"])


def test_a_silent_process_is_killed_and_a_dead_one_noticed(capfd):
    def program(text):
        return [sys.executable, "-c", text]

    assert gpu.supervise(program("print('one'); import time; time.sleep(60)"), 1.0) is None
    assert gpu.supervise(program("import os; print('two'); os._exit(3)"), 30.0) == 3
    assert gpu.supervise(program("print('three')"), 30.0) == 0
    assert capfd.readouterr().out.split() == ["one", "two", "three"]


def test_what_took_a_process_down_stands_as_an_error_and_is_not_repeated(monkeypatch):
    """Resuming, errors, and the end of the time."""
    ran, saved = [], []

    def measure(label):
        def run():
            ran.append(label)
            if label == "bad":
                raise RuntimeError("does not compile")
            if label == "deadly":
                raise KeyboardInterrupt
            return {"ms": 1.0}

        return run

    labels = ["done", "bad", "deadly", "last"]
    monkeypatch.setattr(gpu, "items", lambda *_: [(label, measure(label)) for label in labels])
    report = {"scores": {"done": {"ms": 2.0}}}
    run = [False, report, lambda: saved.append(json.loads(json.dumps(report)))]
    with pytest.raises(KeyboardInterrupt):
        gpu.run_section("scores", *run)
    assert "does not compile" in report["scores"]["bad"]["error"]
    assert saved[-1]["scores"]["deadly"] == {"error": gpu.UNFINISHED}
    gpu.run_section("scores", *run, until=0.0)
    assert ran == ["bad", "deadly"]
    gpu.run_section("scores", *run)
    assert ran == ["bad", "deadly", "last"]
    assert report["scores"]["done"] == {"ms": 2.0}
    assert "| scores | last | ms 1 |" in gpu.table(
        {"device": "d", "jax": "j", "commit": "c", **report}
    )
