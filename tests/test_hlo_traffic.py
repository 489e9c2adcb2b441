"""What a compiled GPU program moves, counted: a program by hand that has all that counts."""

import importlib.util
import sys
from pathlib import Path

import pytest

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


BRANCHES = """HloModule jit_g

%small (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} copy(%a)
}

%large (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} copy(%a)
  ROOT %c = f32[8]{0} copy(%b)
}

ENTRY %main (x: f32[8], i: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %i = pred[] parameter(1)
  %y = f32[8]{0} call(%x), to_apply=%small
  BRANCH
}
"""


@pytest.mark.parametrize(
    "branch",
    [
        "conditional(%i, %y, %y), true_computation=%small, false_computation=%large",
        "conditional(%i, %y, %y), branch_computations={%large, %small}",
    ],
)
def test_calls_and_branches(branch):
    found = hlo.traffic(BRANCHES.replace("BRANCH", f"ROOT %z = f32[8]{{0}} {branch}"))
    assert (found.bytes, found.kernels) == (3 * 2 * 32, 3)


def test_what_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="unknown traffic of all-reduce"):
        hlo.traffic(BRANCHES.replace("BRANCH", "ROOT %z = f32[8]{0} all-reduce(%y), to_apply=%s"))
    with pytest.raises(KeyError, match="f8e4m3"):
        hlo.size("f8e4m3[8]")
