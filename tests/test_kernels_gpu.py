"""Mosaic GPU kernels: interpreted against the XLA references, and lowered for an H100.

Both need a jax newer than 0.10 (Python 3.12); the full compilation also needs NVIDIA's plugin and
compiler. None of this has run on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from lookahead_jax.kernels.specs import SPECS, call
from tests.kernel_cases import NO_WINDOW, arguments, attention, compare, finished, scores

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="this jax cannot interpret Mosaic GPU"
)


@interpreter
@pytest.mark.parametrize(("rows", "dim"), [(5, 64), (5, 128), (40, 128)])
def test_attention_over_a_cache(rows, dim):
    """Runs of blocks, positions per head, holes, an empty head, a window; one tile and two."""
    make = functools.partial(arguments, rows, 256, 2, dim, dtype=jnp.bfloat16)
    cases = [(make(), NO_WINDOW), (make(seed=1), 200), (make(data="blind"), NO_WINDOW)]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        # Probabilities and outputs (up to 3) are rounded to 8 bits, at other maxima than XLA's.
        compare("pallas_gpu", attention, cases, None, tolerance=0.03, softcap=2.0, layer=1)


@interpreter
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_scores(reduce):
    """Both sweeps, with and without own keys; the observers do not fill a tile."""
    make = functools.partial(arguments, 5, 256, 2, 64, dtype=jnp.bfloat16, per_head=False)
    cases = [(make(), NO_WINDOW), (make(data="empty"), 200)]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        compare("pallas_gpu", scores, cases, None, reduce=reduce, own=reduce == "mean")


@interpreter
@pytest.mark.parametrize(("group", "pool"), [("mean", None), ("max", None), ("mean", ("max", 3))])
def test_scores_of_kv_heads(group, pool):
    """The group is reduced in the kernel; what is pooled is pooled after it."""
    cases = [(arguments(5, 256, 2, 64, dtype=jnp.bfloat16), NO_WINDOW)]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        compare("pallas_gpu", finished, cases, None, reduce="mean", pool=pool, group=group)


@interpreter
@pytest.mark.parametrize("name", ["scores_128k", "scores_window_32k", "tree_64_32k", "decode_1k"])
def test_llama_8b_shapes_lower_for_cuda(name):
    spec = SPECS[name]
    mesh = AbstractMesh((1,), ("x",), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        run = functools.partial(call, spec, implementation="pallas_gpu", scale=0.1)
        program = jax.jit(run).trace(spec.shapes())
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    # No probabilities of all observers on all keys, whatever their layout.
    assert f"x4x{spec.rows}x{spec.keys}xf32" not in text


def test_a_kernel_that_is_named_runs_or_says_why_not():
    with pytest.raises(NotImplementedError, match="pallas_gpu: head dim 48"):
        attention(arguments(3, 128, 2, 48, dtype=jnp.bfloat16), None, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="pallas_gpu: queries float32"):
        attention(arguments(3, 128, 2, 64), None, implementation="pallas_gpu")
    many = arguments(600, 128, 2, 64, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="600 observers of 2 heads do not fit"):
        scores(many, None, implementation="pallas_gpu", reduce="sum")
