"""The TPU kernels compiled for chips that are not there (needs the extra `tpu-aot`).

Bounds hold the compiler's memory and its final static schedule (libtpu 0.0.51): they are
regression bounds, about 10 % above what benchmarks/tpu_estimate.py reported when they were set.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lookahead_jax.kernels.specs import SPECS

ROOT = Path(__file__).parents[1]
COLUMNS, LSE, ATTENTION = "importance_column_scores", "importance_row_lse", "block_attention"

# Per chip and spec: for each kernel, VLIW bundles per key and KV head, and spilled registers.
BOUNDS = {
    ("v5e", "scores_128k"): {COLUMNS: (0.36, 0)},
    ("v5e", "scores_window_32k"): {LSE: (0.72, 0), COLUMNS: (0.87, 150)},
    ("v5e", "scores_32k_dim64"): {COLUMNS: (0.32, 0)},
    ("v5e", "decode_1k"): {ATTENTION: (0.9, 0)},
    ("v5e", "decode_128k"): {ATTENTION: (0.57, 250)},
    ("v5e", "decode_32k_dim64"): {ATTENTION: (0.18, 50)},
    ("v5e", "tree_64_32k"): {ATTENTION: (1.46, 2050)},
    ("v5p", "scores_128k"): {COLUMNS: (0.41, 0)},
    ("v5p", "scores_window_32k"): {LSE: (0.77, 0), COLUMNS: (0.9, 150)},
    ("v5p", "scores_32k_dim64"): {COLUMNS: (0.34, 0)},
    ("v5p", "decode_1k"): {ATTENTION: (1.18, 0)},
    ("v5p", "decode_128k"): {ATTENTION: (0.63, 200)},
    ("v5p", "decode_32k_dim64"): {ATTENTION: (0.22, 50)},
    ("v5p", "tree_64_32k"): {ATTENTION: (1.53, 2050)},
    ("v6e", "scores_128k"): {COLUMNS: (0.31, 350)},
    ("v6e", "scores_window_32k"): {LSE: (0.7, 750), COLUMNS: (0.73, 900)},
    ("v6e", "scores_32k_dim64"): {COLUMNS: (0.26, 850)},
    ("v6e", "decode_1k"): {ATTENTION: (0.86, 0)},
    ("v6e", "decode_128k"): {ATTENTION: (0.47, 200)},
    ("v6e", "decode_32k_dim64"): {ATTENTION: (0.17, 100)},
    ("v6e", "tree_64_32k"): {ATTENTION: (1.1, 2400)},
}
VMEM = 16 * 2**20  # what a kernel may take on the smallest of these chips


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """In a process of its own: the compiler reads its flags once, when it is loaded."""
    out = tmp_path_factory.mktemp("estimate") / "report.json"
    unset = ("XLA_FLAGS", "JAX_PLATFORMS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    specs = dict.fromkeys(spec for _, spec in BOUNDS)
    done = subprocess.run(
        [sys.executable, "benchmarks/tpu_estimate.py", "--out", str(out), "--specs", *specs],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed: pip install -e '.[tpu-aot]'",
    ),
]


def test_llama_8b_shapes_fit_their_bounds(report):
    rows = {(row["chip"], row["spec"]): row for row in report["rows"]}
    assert set(rows) == set(BOUNDS)
    for key, bounds in BOUNDS.items():
        row, spec = rows[key], SPECS[key[1]]
        assert set(row["kernels"]) == set(bounds), key
        for name, (per_key, spills) in bounds.items():
            kernel = row["kernels"][name]
            assert 0.5 * per_key < kernel["bundles_per_key"] <= per_key, (key, name)
            assert kernel["spills"] <= spills, (key, name)
            assert 0 < kernel["vmem_bytes"] < VMEM, (key, name)
        # No [N, M, T] and no copy of keys or values: at most the output once more, and change.
        assert row["temporaries"] <= spec.output_bytes + 2**20 + spec.key_bytes // 64, key


def test_the_schedule_keeps_up_with_memory_on_v5e(report):
    """Scoring with known statistics and decoding from a long cache wait for memory, not for us."""
    rows = {(row["chip"], row["spec"]): row for row in report["rows"]}
    for spec in ("scores_128k", "decode_128k", "decode_1k"):
        row = rows["v5e", spec]
        assert 0 < row["schedule_ms"] < row["memory_ms"], spec


def test_keys_and_values_stay_on_their_chips(report):
    """Batch over 2 and KV heads over 4 of v5e:2x4, from NamedSharding to the compiled program."""
    assert [case["spec"] for case in report["sharded"]] == ["scores_32k", "tree_64_32k"]
    for case in report["sharded"]:
        assert case["mesh"] == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 4}
        assert case["kernel_calls"] == 1
        for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert case[collective] == 0, (case["spec"], collective)
        assert case["temporaries"] < 2**20
        # Four rows of keys (and values) over 8 chips: each holds an eighth.
        held = SPECS[case["spec"]].key_bytes * 4 // 8
        assert held <= case["arguments"] < 1.1 * held


def test_a_step_of_llama_8b_moves_no_cache_between_chips(report):
    """One node and 64 over 1,024 slots, heads over 8 chips: only rows of activations travel."""
    for nodes, step in zip((1, 64), report["steps"][:2], strict=True):
        weights = 16.06e9 / 8
        assert weights < step["arguments_per_chip"] < 1.05 * weights
        assert step["temporaries_per_chip"] < 2**20
        assert step["largest_all_gather_elements"] <= nodes * 4096
        assert step["attention_schedule_ms"] < 0.05 * step["memory_ms"]


def test_a_step_copies_no_layer_out_of_the_cache(report):
    """262,144 slots: a layer's keys are 64 MiB on each chip, more than XLA would hide in VMEM."""
    step = report["steps"][2]
    assert step["arguments_per_chip"] > 4 * 2**30
    assert step["temporaries_per_chip"] < 2**20
