"""Who runs where: the implementation that is chosen for a platform and a shape."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lookahead_jax.kernels import dispatch
from lookahead_jax.model.sharding import make_mesh
from tests.kernel_cases import arguments, attention, scores


@pytest.mark.parametrize(
    ("dim", "slots", "kernels"), [(128, 256, 2), (64, 256, 2), (192, 256, 0), (128, 200, 0)]
)
def test_tpus_get_the_kernels_where_they_fit(dim, slots, kernels):
    """Lowered for TPU on any machine; other platforms, and shapes that do not fit, get XLA."""

    def run(*a):
        out, lse = attention(a, None, implementation=None)
        return out, scores(a, None, implementation=None, reduce="mean", lse=lse)

    found = arguments(4, slots, 2, dim, dtype=jnp.bfloat16)

    def program():
        traced = jax.jit(run).trace(*found)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    tpu = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=tpu)
    with jax.sharding.use_abstract_mesh(mesh):
        assert program().count("@tpu_custom_call") == kernels
    assert "@tpu_custom_call" not in program()


def test_several_tpus_get_kernels_only_under_a_mesh(monkeypatch):
    """XLA cannot partition a kernel; without a mesh it would fail on sharded arrays."""
    monkeypatch.setattr(dispatch, "target_platform", lambda: "tpu")
    assert jax.device_count() == 4
    assert dispatch.preferred(128) == "xla"
    with jax.set_mesh(make_mesh(tensor=2)):
        assert dispatch.preferred(128) == "pallas_tpu"
        assert dispatch.preferred(64) == "pallas_tpu"
        assert dispatch.preferred(192) == "xla"
