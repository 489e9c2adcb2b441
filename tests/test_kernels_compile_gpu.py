"""Mosaic GPU kernels, and whole steps of a model, compiled for an H100 that is not there.

An optional job:

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm
    pytest tests/test_kernels_compile_gpu.py

(the plugins of the installed jax's version, in a folder on PYTHONPATH; no driver is needed).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
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
  driver_version: "13.0.0" kernel_mode_driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BEGINNING = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

topology = topologies.get_topology_desc(
    platform="cuda", topology_name="", target_config=sys.argv[1], topology="1x1x1"
)
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
place = NamedSharding(mesh, PartitionSpec())

def put(tree):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree
    )

def report(name, lower):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = lower().compile()
    print(name, program.memory_analysis().temp_size_in_bytes)
"""
KERNELS = """
from lookahead_jax.kernels.specs import SPECS, call

for name in sys.argv[2:]:
    spec = SPECS[name]
    run = lambda a: call(spec, a, "pallas_gpu", 0.1)
    report(name, lambda: jax.jit(run).lower(put(spec.shapes())))
"""
STEPS = """
from lookahead_jax.cache import KVCache
from lookahead_jax.config import ModelConfig
from lookahead_jax.decoding import decode_burst, start
from lookahead_jax.drafters import make_drafter
from lookahead_jax.params import abstract_params
from lookahead_jax.sampling import GREEDY, sampling_rows
from lookahead_jax.train.shapes import SHAPES

config = ModelConfig.from_hf(SHAPES["llama-3.1-8b"])
params = put(abstract_params(config, jnp.bfloat16))

def begin(batch):
    shape = (config.num_layers, batch, config.num_kv_heads, 1152)
    slots = jnp.zeros((*shape, config.head_dim), jnp.bfloat16)
    rows = jnp.zeros(batch, jnp.int32)
    pos, length = (jnp.zeros(size, jnp.int32) for size in (shape, shape[:3]))
    cache = KVCache(slots, slots, pos, length, rows, rows)
    state = start(
        cache, jnp.zeros((batch, config.vocab_size)),
        sampling=sampling_rows([GREEDY] * batch, [0] * batch, config.vocab_size), limit=rows,
        eos=jnp.full(1, -1, jnp.int32), seen=None, width=64,
    )
    drafter = make_drafter("prompt_lookup")
    return state.replace(draft=drafter.init(batch, 64, config))

for batch, nodes in ((1, 1), (8, 1), (1, 64)):
    state = put(jax.eval_shape(lambda: begin(batch)))
    options = {} if nodes == 1 else {"drafter": make_drafter("prompt_lookup")}
    report(f"{batch}x{nodes}", lambda: decode_burst.lower(
        params, state, config=config, steps=put(jnp.int32(16)), nodes=nodes, **options
    ))
"""


optional = pytest.mark.skipif(PLUGIN is None, reason="JAX's CUDA plugin is not installed")


def temporaries(program: str, *arguments: str) -> dict[str, int]:
    """Bytes of what a process compiles: the compiler's folder is named before JAX starts."""
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
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING + program, H100, *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}


@pytest.mark.slow
@optional
def test_llama_8b_shapes_compile_for_an_h100():
    names = ["scores_128k", "scores_window_32k", "tree_64_32k", "decode_1k"]
    found = temporaries(KERNELS, *names)
    assert list(found) == names
    assert found["scores_128k"] < 2**21  # positions and statistics, no [N, M, T]
    assert max(found.values()) < 2**25  # the parts of a split cache


@pytest.mark.slow
@optional
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this XLA copies layers out of a stack")
def test_steps_of_an_8b_model_copy_no_weights():
    """Beside cuBLAS's 32 MiB: a layer's smallest matrix has 8, the vocabulary in float32 2,004."""
    found = temporaries(STEPS)
    limits = {"1x1": 5, "8x1": 26, "1x64": 27}
    assert {
        name: size - 2**25 for name, size in found.items() if size - 2**25 > limits[name] * 2**20
    } == {}
    assert found.keys() == limits.keys()
