"""What a compiled GPU program moves, counted: a program by hand that has all that counts."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

FILE = Path(__file__).parents[1] / "benchmarks" / "hlo_traffic.py"
spec = importlib.util.spec_from_file_location("hlo_traffic", FILE)
assert spec is not None
assert spec.loader is not None
hlo = sys.modules["hlo_traffic"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hlo)

TEXT = """HloModule jit_f

%sliced (p0: bf16[4,8,8], p1: s32[], p2: bf16[2,8]) -> (bf16[2,8], s8[64]) {
  %p0 = bf16[4,8,8]{2,1,0} parameter(0)
  %flat = bf16[4,8,8]{2,1,0} bitcast(%p0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[2,8]{1,0} parameter(2)
  %w = bf16[1,8,8]{2,1,0} dynamic-slice(%flat, %p1, %p1, %p1), dynamic_slice_sizes={1,8,8}
  ROOT %out = (bf16[2,8]{1,0}, s8[64]{0}) custom-call(%p2, %w), custom_call_target="gemm"
}

%written (p0: f32[4,16], p1: s32[], p2: bf16[2,8]) -> f32[4,16] {
  %p0 = f32[4,16]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[2,8]{1,0} parameter(2)
  %row = f32[1,16]{1,0} convert(%p2)
  ROOT %put = f32[4,16]{1,0} dynamic-update-slice(%p0, %row, %p1, %p1)
}

%body (arg: (s32[], bf16[2,8], bf16[4,8,8], f32[4,16])) -> (s32[], bf16[2,8]) {
  %arg = (s32[], bf16[2,8]{1,0}, bf16[4,8,8]{2,1,0}, f32[4,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[2,8]{1,0} get-tuple-element(%arg), index=1
  %ws = bf16[4,8,8]{2,1,0} get-tuple-element(%arg), index=2
  %a = f32[4,16]{1,0} get-tuple-element(%arg), index=3
  %gemm = (bf16[2,8]{1,0}, s8[64]{0}) fusion(%ws, %i, %x), kind=kCustom, calls=%sliced
  %y = bf16[2,8]{1,0} get-tuple-element(%gemm), index=0
  ROOT %b = f32[4,16]{1,0} fusion(%a, %i, %y), kind=kLoop, calls=%written, metadata={op_name="x"}
}

ENTRY %main (x: bf16[2,8], n: s32[]) -> f32[8] {
  %x = bf16[2,8]{1,0} parameter(0)
  %loop = (s32[], bf16[2,8]{1,0}) while(%x), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %y = bf16[2,8]{1,0} get-tuple-element(%loop), index=1
  %c = bf16[2,8]{1,0} copy(%y)
  %one = (s32[], bf16[2,8]{1,0}) while(%c), condition=%c, body=%body
  ROOT %r = f32[8]{0} custom-call(%c), custom_call_target="head"
}
"""


def test_slices_updates_and_loops():
    slice_bytes, row, index, update = 2 * 8 * 8, 2 * 2 * 8, 4, 4 * 16
    turn = (slice_bytes + index + row + row) + (index + row + update)
    found = hlo.traffic(TEXT)
    assert found.bytes == 4 * turn + 2 * row + turn + row + 4 * 8
    assert found.kernels == 4 * 2 + 1 + 2 + 1


def test_a_compiled_program_is_read():
    """XLA's text on CPU has the same form; a product of two matrices moves at least all three."""
    a = jnp.ones((64, 64))
    text = jax.jit(lambda a, b: jnp.tanh(a * b) @ b + 1).lower(a, a).compile().as_text()
    found = hlo.computations(text)
    assert any(i.opcode == "parameter" for i in found[""].values())
    assert hlo.traffic(text).kernels > 0
