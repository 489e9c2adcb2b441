"""Training as two processes, then one, through the command line alone (gloo on CPU)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lookahead_jax.checkpoints.load import load, save_params
from lookahead_jax.modules.files import load_modules
from lookahead_jax.train.data import DataConfig, prepare
from tests import tiny

ROOT = Path(__file__).parents[1]
STEPS = 400


def write_inputs(folder):
    model = tiny.config(num_hidden_layers=1, vocab_size=96)
    fields = {**tiny.LLAMA, "num_hidden_layers": 1, "vocab_size": 96}
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(fields))
    save_params(folder / "model", tiny.params(model), model)
    rows = [{"prompt": p, "response": p[3:8]} for p in tiny.prompts((16,) * 8, vocab=96)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (folder / "rows.jsonl",)
    prepare(DataConfig(model=folder / "model", source=source, out=folder / "data", max_prompt=64))
    config = {
        "model": "model", "data": "data", "run": "run", "steps": STEPS, "batch": 4,
        "modules": {"tokens": 3, "rank": 2, "alpha": 4, "targets": ["q"], "init": "table"},
        "optimizer": {"rate": 1e-3, "warmup": 1},
        "mesh": {"fsdp": 2, "tensor": 2}, "log_every": 1, "save_every": 1000,
    }  # fmt: skip
    (folder / "train.json").write_text(json.dumps(config))


def start(folder, count):
    """`count` processes with four devices in all; weights and batch are split across them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0"
        " --xla_cpu_enable_concurrency_optimized_scheduler=false"  # as in conftest.py
        f" --xla_force_host_platform_device_count={4 // count}",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    if count > 1:
        env |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command = [sys.executable, "-m", "lookahead_jax.train.lookahead", "train.json"]
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env=env | {"JAX_PROCESS_ID": str(i)},
            stderr=(folder / f"stderr.{i}").open("w"),
        )
        for i in range(count)
    ]


def finish(processes, folder):
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [(folder / f"stderr.{i}").read_text() for i in range(len(processes))]
    assert not any(codes), "\n".join(said)
    return said


def steps_logged(folder):
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.slow
def test_a_sigterm_to_one_stops_both_at_one_step_and_one_process_resumes(tmp_path):
    write_inputs(tmp_path)
    processes = start(tmp_path, 2)
    until = time.monotonic() + 400
    while not steps_logged(tmp_path) and time.monotonic() < until:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes, tmp_path)
    (saved,) = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert 0 < saved < STEPS
    assert steps_logged(tmp_path) == list(range(saved))
    # The first process speaks for both.
    assert [f"stopped after step {saved} of {STEPS}; " in text for text in said] == [True, False]

    finish(start(tmp_path, 1), tmp_path)
    assert steps_logged(tmp_path) == list(range(STEPS))
    model = load(tmp_path / "model")
    load_modules(tmp_path / "run" / "modules", params=model.params, config=model.config)
