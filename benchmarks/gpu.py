"""Kernels and the whole pipeline on one accelerator, in parts that can be run one at a time.

    python benchmarks/gpu.py --section ceilings        # first: the others refer to it
    python benchmarks/gpu.py --section scores --section attention ...
    python benchmarks/gpu.py --table                   # the merged report as a table

Sections: ceilings, scores, attention (kernels, each checked against float64 NumPy before it is
timed); ttft, decode, steps, memory, train (an 8B-shaped random model in bfloat16); drafting (the
embedded model); peer (transformers + kvpress on the same card, "not run" where not installed).
Every measurement is written as soon as it is made, to one JSON per card and commit, and skipped
when it stands there; so a section that is cut off goes on where it stopped. An error is a result
too: its text is kept, and --again repeats it. `--smoke` runs everything at toy sizes on any
machine and keeps nothing.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpu_model

from lookahead_jax.files import atomic_write
from lookahead_jax.kernels.attention import block_attention
from lookahead_jax.kernels.importance import head_scores
from lookahead_jax.kernels.specs import SPECS, Spec, attention, scores

ROOT = Path(__file__).resolve().parent.parent
Item = tuple[str, Callable[[], Any]]
SETTINGS = dict(scale=0.088, softcap=None, window=None)


def kernel_specs(op: str, smoke: bool) -> list[Spec]:
    """Of an operation: the shapes of the issue, or toys; decoding goes through P = 1 ... 128."""
    if smoke:
        make = scores if op == "scores" else attention
        return [make(f"{op}_toy", 4, 256, query_heads=4, kv_heads=2, head_dim=64)]
    found = [spec for spec in SPECS.values() if spec.op == op]
    if op == "attention":
        found += [attention(f"tree_{p}_2k", p, 2048) for p in (1, 2, 4, 8, 16, 32, 64, 128)]
    return found


def arguments(spec: Spec) -> dict[str, jax.Array]:
    """Random arguments; the rows stand behind the keys, all slots are filled."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    found = {}
    for name, shape in spec.shapes().items():
        if jnp.issubdtype(shape.dtype, jnp.floating):
            found[name] = jax.random.normal(next(keys), shape.shape, shape.dtype)
    rows = jnp.arange(spec.rows, dtype=jnp.int32)
    shapes = spec.shapes()
    found["q_pos"] = jnp.broadcast_to(spec.keys + rows, shapes["q_pos"].shape)
    found["visible"] = jnp.broadcast_to(rows[None] <= rows[:, None], shapes["visible"].shape)
    found["pos"] = jnp.broadcast_to(jnp.arange(spec.keys, dtype=jnp.int32), shapes["pos"].shape)
    if "lse" in found:  # what the attention would have found, nearly
        found["lse"] = jnp.full(shapes["lse"].shape, np.log(spec.keys) + 0.5, jnp.float32)
    if spec.op == "attention":
        found["length"] = jnp.full(shapes["length"].shape, spec.keys, jnp.int32)
    return found


def call(spec: Spec, implementation: str, a: dict[str, jax.Array]) -> Any:
    """The public operation by one implementation."""
    common: Any = dict(**SETTINGS, implementation=implementation)
    own = a["own_k"], a["visible"]
    if spec.op == "scores":
        return head_scores(
            a["q"], a["q_pos"], a["k"], a["pos"], own, lse=a.get("lse"), reduce="mean", **common
        )
    context = a["k"], a["v"], a["pos"]
    return block_attention(
        a["q"], a["own_k"], a["own_v"], a["visible"], a["q_pos"], context,
        slots=(0, a["length"]), **common,
    )[0]  # fmt: skip


def exact(spec: Spec, a: dict[str, jax.Array]) -> np.ndarray:
    """The first query head of the first row in float64: scores [T], or outputs [P, H]."""
    q, k, own_k = (
        np.asarray(a[n][0, i], np.float64) for n, i in (("k", 0), ("k", 0), ("own_k", 0))
    )
    q = np.asarray(a["q"][0, :, 0], np.float64)
    logits = np.concatenate([q @ k.T, q @ own_k.T], axis=1) * SETTINGS["scale"]
    seen = np.concatenate([np.ones((len(q), len(k)), bool), np.asarray(a["visible"][0])], axis=1)
    logits = np.where(seen, logits, -np.inf)
    if spec.op == "scores" and "lse" in a:
        lse = np.asarray(a["lse"][0, 0], np.float64)[:, None]
    else:
        top = logits.max(1, keepdims=True)
        lse = top + np.log(np.exp(logits - top).sum(1, keepdims=True))
    p = np.exp(logits - lse)
    if spec.op == "scores":
        return p[:, : len(k)].mean(0)
    values = np.concatenate([np.asarray(a[n][0, 0], np.float64) for n in ("v", "own_v")])
    return p @ values


def repeated(f: Callable[[Any], Any], start: Any, smoke: bool) -> float:
    """Seconds of one `state = f(state)`, from loops of two lengths on the device: no dispatch."""
    loop = jax.jit(lambda s, times: jax.lax.fori_loop(0, times, lambda _, s: f(s), s))

    def run(times: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(loop(start, times))
        return time.perf_counter() - began

    run(2)
    few, many = (1, 3) if smoke else (5, 5 + int(min(max(0.2 / max(run(10) / 10, 1e-6), 10), 2000)))
    found = [(run(many) - run(few)) / (many - few) for _ in range(1 if smoke else 5)]
    return sorted(found)[len(found) // 2]


def kernel_seconds(f: Callable[..., jax.Array], a: dict[str, jax.Array], smoke: bool) -> float:
    """Of one call. Each waits for the one before, whose whole result is kept; XLA drops none."""

    def body(state):
        q, _ = state
        out = f({**a, "q": q})
        finite = out.reshape(-1)[0] < jnp.asarray(1e30, out.dtype)
        return jnp.where(finite, q, jnp.zeros((), q.dtype)), out

    shape = jax.eval_shape(f, a)
    return repeated(body, (a["q"], jnp.zeros(shape.shape, shape.dtype)), smoke)


def kernels(op: str, smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Every shape by every implementation that takes it, next to its floor on this card."""
    names = ["xla", "pallas_gpu"] + (["pallas_tpu"] if jax.default_backend() == "tpu" else [])
    for spec in kernel_specs(op, smoke):
        for name in names if jax.default_backend() != "cpu" else ["xla"]:
            yield f"{spec.name} {name}", partial(measure_kernel, spec, name, smoke, report)


def measure_kernel(spec: Spec, name: str, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    """Error against float64, then the time, and how it stands to the floor."""
    a = arguments(spec)
    f = partial(call, spec, name)
    got = jax.jit(f)(a)
    got = np.asarray(got[0, 0] if spec.op == "scores" else got[0, :, 0], np.float64)
    want = exact(spec, a)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error < 0.02:  # bfloat16 keeps 8 bits of probabilities and outputs
        raise ValueError(f"{name} is off by {error:.2e} of the largest value")
    seconds = kernel_seconds(f, a, smoke)
    found = {"ms": 1e3 * seconds, "relative_error": error, "bytes": spec.key_bytes}
    limits = report.get("ceilings", {})
    if all(part in limits for part in ("bandwidth", "matmul", "exponentials")):
        floors = {
            "bytes": spec.key_bytes / limits["bandwidth"]["per_s"],
            "flops": spec.flops / limits["matmul"]["per_s"],
            "exponentials": spec.pairs * (1 if spec.known else 2)
            / limits["exponentials"]["per_s"],
        }  # fmt: skip
        which = max(floors, key=floors.__getitem__)
        found |= {"floor_ms": 1e3 * floors[which], "floor": which}
        found["times_floor"] = seconds / floors[which]
    return found


def ceilings(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """What the card does at best: bytes copied, bfloat16 products, float32 exponentials."""
    n = 256 if smoke else 8192

    def rate(f: Callable[[jax.Array], jax.Array], x: jax.Array, amount: float) -> dict[str, float]:
        return {"per_s": amount / repeated(f, x, smoke)}

    def bandwidth():
        x = jnp.zeros((n, 16 * n), jnp.bfloat16)
        return rate(lambda x: x + jnp.ones((), x.dtype), x, 2 * 2 * x.size)

    def matmul():
        # Normal entries of this size keep the length of the rows; zeros would draw less power.
        x, w = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
        w = w / jnp.asarray(n**0.5, w.dtype)
        return rate(lambda x: x @ w, x, 2.0 * n**3)

    def exponentials():
        def chain(x):
            for _ in range(64):
                x = jnp.exp(-x)
            return x

        x = jnp.zeros((n, n // 8), jnp.float32)
        return rate(chain, x, 64.0 * x.size)

    yield "bandwidth", bandwidth
    yield "matmul", matmul
    yield "exponentials", exponentials


SECTIONS: dict[str, Callable[[bool, dict[str, Any]], Iterator[Item]]] = {
    "ceilings": ceilings,
    "scores": partial(kernels, "scores"),
    "attention": partial(kernels, "attention"),
    "ttft": gpu_model.ttft,
    "decode": gpu_model.decode,
    "steps": gpu_model.steps,
    "memory": gpu_model.memory,
    "train": gpu_model.train,
    "drafting": gpu_model.drafting,
    "peer": gpu_model.peer,
}


def run_section(name: str, smoke: bool, report: dict[str, Any], again: bool, save) -> None:
    """Makes what is missing of a section; `save` is called after every measurement."""
    part = report.setdefault(name, {})
    for label, measure in SECTIONS[name](smoke, report):
        if label in part and not (again and "error" in part[label]):
            continue
        began = time.perf_counter()
        try:
            part[label] = measure()
        except Exception as error:  # out of memory or not supported: the others still run
            if smoke:
                raise
            part[label] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        part[label] = {**part[label], "wall_s": round(time.perf_counter() - began, 1)}
        save()
        print(name, label, json.dumps(part[label]), flush=True)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, one row per measurement."""
    rows = [f"{report['device']}, jax {report['jax']}, commit {report['commit']}", ""]
    rows += ["| section | measurement | result |", "| --- | --- | --- |"]
    for section in SECTIONS:
        for label, found in report.get(section, {}).items():
            shown = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in found.items()
                if key != "wall_s"
            )
            rows.append(f"| {section} | {label} | {shown} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", action="append", choices=list(SECTIONS))
    parser.add_argument("--smoke", action="store_true", help="toy sizes; nothing is kept")
    parser.add_argument("--again", action="store_true", help="repeat what ended in an error")
    parser.add_argument("--table", action="store_true", help="print the report and stop")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() or "unknown"
    device = jax.devices()[0].device_kind
    card = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = options.results / f"gpu-{card}-{commit}.json"
    report: dict[str, Any] = {"device": device, "jax": jax.__version__, "commit": commit}
    if path.exists() and not options.smoke:
        report = json.loads(path.read_text())

    def save() -> None:
        if not options.smoke:
            atomic_write(path, json.dumps(report, indent=1) + "\n")

    if not options.table:
        for name in options.section or SECTIONS:
            run_section(name, options.smoke, report, options.again, save)
    print(table(report))


if __name__ == "__main__":
    main()
