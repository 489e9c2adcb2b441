"""Mosaic GPU kernels, and whole steps of a model, compiled for an H100 that is not there.

An optional job:

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm \\
        nvidia-cuda-runtime
    pytest tests/test_kernels_compile_gpu.py

(the plugins of the installed jax's version, in a folder on PYTHONPATH; no driver is needed).
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("e", ROOT / "benchmarks" / "gpu_estimate.py")
assert spec is not None
assert spec.loader is not None
estimate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(estimate)
PROGRAM = """
import sys
sys.path.insert(0, "benchmarks")
from gpu_estimate import Card
from lookahead_jax.kernels.specs import SPECS, call

card = Card("h100")
for name in sys.argv[1:]:
    spec = SPECS[name]
    program = card.compile(lambda a: call(spec, a, "pallas_gpu", 0.1), card.put(spec.shapes()))
    print(name, program.memory_analysis().temp_size_in_bytes)
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="JAX's CUDA plugin is not installed",
    ),
]


def ran(*command) -> str:
    """What a process says that can compile for CUDA."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=estimate.environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_llama_8b_shapes_compile_for_an_h100():
    names = ["scores_128k", "scores_window_32k", "tree_64_32k", "decode_1k", "decode_32k"]
    lines = [line.split() for line in ran("-c", PROGRAM, *names).splitlines()]
    temporaries = {name: int(size) for name, size in lines}
    assert list(temporaries) == names
    assert temporaries["scores_128k"] < 2**21  # positions and statistics, no [N, M, T]
    assert max(temporaries.values()) < 2**25  # the parts of a split cache
    assert temporaries["decode_32k"] < 2**22  # of few rows, no padding


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this XLA copies layers out of a stack")
def test_steps_of_an_8b_model_read_weights_and_keys_in_place(tmp_path):
    """One copy of a layer's smallest matrix would be 1.5 % more, of the largest 25 %."""
    out = tmp_path / "estimate.json"
    ran("benchmarks/gpu_estimate.py", "--card", "h100", "--child", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    times = {label: row.get("times_floor") for label, row in rows.items()}
    assert times["token, 1024 entries, XLA's own options"] > 2
    assert times["token, 128 entries"] < 1.02
    assert times["token, 1024 entries"] < 1.03
    assert times["token, 32768 entries"] < 1.3  # values are copied: dead ones are zeroed
    assert times["step of 8 nodes, 1024 entries"] < 1.04
    assert times["step of 64 nodes, 1024 entries"] < 1.2  # logits in float32
    # Weights once more, for the lookahead rows alone, would be 14 GB.
    assert rows["prompt of 8192, lookaheadkv"]["more_gb"] < 13
    assert rows["prompt of 8192, lookaheadkv"]["kernels"] < 2150
