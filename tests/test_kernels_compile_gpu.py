"""The Mosaic GPU kernels compiled for an H100 that is not there: an optional job.

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm
    pytest tests/test_kernels_compile_gpu.py

(the plugins of the installed jax's version, in a folder on PYTHONPATH; no driver is needed).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = next(
    (name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if importlib.util.find_spec(name)),
    None,
)
# Facts of the card, as openxla/xla pull request 25919 states them.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
PROGRAM = """
import sys
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lookahead_jax.kernels.specs import SPECS, call

topology = topologies.get_topology_desc(
    platform="cuda", topology_name="", target_config=sys.argv[1], topology="1x1x1"
)
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
place = NamedSharding(mesh, PartitionSpec())
for name in sys.argv[2:]:
    spec = SPECS[name]
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), spec.shapes()
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = lambda a: call(spec, a, "pallas_gpu", 0.1)
        program = jax.jit(run).lower(shapes).compile()
    print(name, program.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(PLUGIN is None, reason="JAX's CUDA plugin is not installed")
def test_llama_8b_shapes_compile_for_an_h100():
    """In a process of its own: the compiler's folder is named before JAX starts."""
    found = importlib.util.find_spec("nvidia")
    assert found is not None, "NVIDIA's compiler is not installed"
    folders = [Path(base) / name for base in found.submodule_search_locations or ()
               for name in ("cu13", "cuda_nvcc")]  # fmt: skip
    cuda = next(folder for folder in folders if (folder / "bin" / "ptxas").exists())
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{cuda / 'bin'}:{os.environ['PATH']}",
        "CUDA_ROOT": str(cuda),
        "LD_LIBRARY_PATH": ":".join(str(p) for p in cuda.parent.glob("*/lib")),
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={cuda} --xla_gpu_autotune_level=0",
    }
    names = ["scores_128k", "scores_window_32k", "tree_64_32k", "decode_1k"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, H100, *names],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    temporaries = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert list(temporaries) == names
    assert temporaries["scores_128k"] < 2**21  # positions and statistics, no [N, M, T]
    assert max(temporaries.values()) < 2**25  # the parts of a split cache
