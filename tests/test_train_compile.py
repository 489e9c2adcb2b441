"""The real training step, compiled for pods that are not there (needs the extra `tpu-aot`)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lookahead_jax.train.compile import Compile, compile_training_step

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install -e '.[tpu-aot]'",
)
@pytest.mark.parametrize(
    ("topology", "chips", "hbm"), [("v5e:16x16", 256, 16), ("v5p:4x4x4", 64, 95)]
)
def test_llama_8b_trains_on_prompts_of_16k(topology, chips, hbm):
    """A process of its own, without the tests' settings: the compiler sees the real program."""
    unset = ("XLA_FLAGS", "JAX_PLATFORMS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-m", "lookahead_jax.train.compile", "--topology", topology]
    done = subprocess.run(
        [*command, "--model", "llama-3.1-8b", "--prompt", "16384"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert (report["chips"], report["hbm_gib"]) == (chips, hbm)
    # Weights in bfloat16, split over 8 chips, are most of what a chip holds.
    assert 16.06e9 / 8 / 2**30 <= report["arguments_gib"] <= report["peak_gib"] < 0.25 * hbm
    # By hand: 32 rows, each one forward pass of 16,896 tokens and a little more.
    assert 8.0 < report["tflops_per_chip"] * chips / 32 / 16896 * 1e12 / 2e9 < 16.0
    # In a layer's body: response and lookahead rows, the latter once more for the backward pass.
    assert report["kernels"]["block_attention"] == 3
    assert report["kernels"]["importance_column_scores"] == 3
    collectives = report["collectives"]
    if isinstance(collectives, str):  # the program cannot be read on every topology
        assert collectives.startswith("not available")
    else:
        # One exchange of heads and one of the MLP's halves per layer body, and few others.
        assert 0 < collectives["all-reduce"] + collectives["all-gather"] < 60
        assert not collectives["all-to-all"]


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"known: llama-3\.1-8b"):
        compile_training_step(Compile(topology="v5e:2x4", model="llama"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lookahead-jax\[tpu-aot\]'"):
        compile_training_step(Compile(topology="v5e:2x4"))
