"""The TPU kernels on two simulated cores under the race detector; memory starts as NaN.

Two cores share the parallel axes of a grid, so a block that both write, or that is read before
its copy has arrived, is seen.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lookahead_jax.kernels import importance_tpu
from tests.kernel_cases import NO_WINDOW, arguments, attention, compare, finished, scores

PARAMETERS = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
FOUND = "RACE DETECTED"  # printed; newer versions of JAX raise


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(importance_tpu, "_ROWS", 48)  # two tiles of observers
    with pltpu.force_tpu_interpret_mode(PARAMETERS):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "settings"),
    [
        (attention, {}),
        (scores, dict(reduce="mean", softcap=3.0)),
        (finished, dict(reduce="max", pool=None, group="mean")),
        (finished, dict(reduce="mean", pool=("max", 7), group="mean")),
        (finished, dict(reduce="max", pool=("max", 3), group="max")),
    ],
    ids=["attention", "both sweeps", "group", "pooled", "pooled as one head"],
)
def test_cores_leave_each_other_alone(function, settings, capfd):
    cases = [(arguments(20, 640, 3, 64), NO_WINDOW), (arguments(20, 640, 3, 64, seed=1), 300)]
    compare("pallas_tpu", function, cases, 256, **settings)
    assert FOUND not in capfd.readouterr().out


def test_the_detector_sees_two_cores_adding_to_one_block(capfd):
    def kernel(x_ref, out_ref):
        out_ref[...] += x_ref[...]

    run = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((None, 8, 128), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )
    said = ""
    try:
        jax.block_until_ready(run(jnp.ones((4, 8, 128))))
    except Exception as error:
        said = str(error)
    assert FOUND in capfd.readouterr().out or "race" in said.lower()
