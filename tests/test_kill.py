"""kill -9 of the real training program, at random moments: the run ends as if nothing had been."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from tests.test_two_processes import ROOT, write_inputs

STEPS, EVERY = 90, 4


def start(folder, run):
    flags = "--xla_backend_optimization_level=0"  # and one device
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    module = [sys.executable, "-m", "lookahead_jax.train.lookahead", "train.json", "--run", run]
    sizes = ["--mesh.fsdp", "1", "--mesh.tensor", "1"]
    pace = ["--steps", str(STEPS), "--save-every", str(EVERY)]
    log = (folder / "stderr").open("a")
    return subprocess.Popen([*module, *sizes, *pace], cwd=folder, env=env, stderr=log)


def lines(folder, run):
    file = folder / run / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def kill_after(process, folder, steps, pause):
    """SIGKILL once so many steps are in the log, and a moment later; the lines it has left."""
    until = time.monotonic() + 300
    while len(lines(folder, "killed")) < steps:
        assert process.poll() is None, (folder / "stderr").read_text()
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(pause)
    process.kill()
    process.wait()
    return [line for line in lines(folder, "killed") if line.endswith("}")]


@pytest.mark.slow
def test_a_killed_run_loses_its_last_interval_and_ends_bit_for_bit_the_same(tmp_path):
    write_inputs(tmp_path)
    assert start(tmp_path, "straight").wait() == 0, (tmp_path / "stderr").read_text()
    moments = random.Random(0)
    left, committed = [], []
    for after in (0, 30):
        process = start(tmp_path, "killed")
        steps = after + moments.randrange(1, 20)
        left.append(kill_after(process, tmp_path, steps, moments.random() * 0.1))
        folder = tmp_path / "killed" / "checkpoints"
        whole = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        committed.append(max(whole, default=0))
    assert start(tmp_path, "killed").wait() == 0, (tmp_path / "stderr").read_text()
    left.append(lines(tmp_path, "killed"))

    for before, after, saved in zip(left, left[1:], committed, strict=False):
        # Lines that a later process kept, seconds included, are steps it did not make again.
        kept = [a == b for a, b in zip(before, after, strict=False)]
        resumed = kept.index(False) if False in kept else len(kept)
        assert resumed == saved
        # A save that was under way does not count; the next one would have waited for it.
        assert len(before) - resumed <= 2 * EVERY
    assert committed[-1] > 0
    for name in ("lookahead_model.safetensors", "lookahead_config.json"):
        mine, whole = ((tmp_path / run / "modules" / name) for run in ("killed", "straight"))
        assert mine.read_bytes() == whole.read_bytes()
    told = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text]
        for text in (lines(tmp_path, "killed"), lines(tmp_path, "straight"))
    ]
    assert told[0] == told[1]
