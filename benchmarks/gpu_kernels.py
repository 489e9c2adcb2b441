"""Sections of gpu.py that time single operations: ceilings, scores, attention, select."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.kernels.specs import SPECS, Spec, attention, call, scores
from lookahead_jax.model.jit import compiler_options
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.selection import select

Item = tuple[str, Callable[[], Any]]
SCALE = 0.088
SCORES = ("scores_32k", "scores_8k", "scores_window_32k", "scores_128k", "scores_response_16k")
ATTENTION = ("tree_64_1k", "decode_32k", "tree_64_32k", "decode_128k", "decode_2k_batch8",
             "observe_32k")  # fmt: skip


def specs(op: str, smoke: bool) -> list[Spec]:
    """The calls of an operation to measure: shapes of Llama 3.1 8B, or toy shapes."""
    if smoke:
        make = scores if op == "scores" else attention
        finish = SPECS["scores_window_32k"].finish if op == "scores" else None
        sizes: Any = dict(query_heads=4, kv_heads=2, head_dim=64, finish=finish)
        return [make(f"{op}_toy", 4, 256, known=op != "scores", **sizes)]
    return [SPECS[name] for name in (SCORES if op == "scores" else ATTENTION)]


def arguments(spec: Spec) -> dict[str, jax.Array]:
    """Random arguments; the rows come after the keys, and all slots are filled."""
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
    if "lse" in found:  # close to what attention would return
        found["lse"] = jnp.full(shapes["lse"].shape, np.log(spec.keys) + 0.5, jnp.float32)
    if spec.op == "attention":
        found["length"] = jnp.full(shapes["length"].shape, spec.keys, jnp.int32)
    return found


def result(spec: Spec, implementation: str, a: dict[str, jax.Array]) -> jax.Array:
    """The scores, or the output of attention."""
    found = call(spec, a, implementation, SCALE)  # pyright: ignore[reportArgumentType]
    return found if spec.op == "scores" else found[0]


def exact(spec: Spec, a: dict[str, jax.Array]) -> np.ndarray:
    """The result for the first row in float64.

    Scores [T] of the first KV head (of its first query head, if scores are per query head), or
    outputs [P, H] of the first query head.
    """
    groups = 1
    if spec.op == "scores" and spec.finish is not None:
        groups = spec.query_heads // spec.kv_heads
    found = np.stack([_exact_head(spec, a, head) for head in range(groups)])
    if spec.op == "attention" or spec.finish is None:
        return found[0]
    if spec.finish.pool is not None:
        kind, kernel = spec.finish.pool
        outside = -np.inf if kind == "max" else 0.0
        padded = np.pad(found, ((0, 0), (kernel // 2, kernel // 2)), constant_values=outside)
        views = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1)
        found = views.max(-1) if kind == "max" else views.mean(-1)
    return found.mean(0) if spec.finish.group == "mean" else found.max(0)


def _exact_head(spec: Spec, a: dict[str, jax.Array], head: int) -> np.ndarray:
    k, own_k = (np.asarray(a[name][0, 0], np.float64) for name in ("k", "own_k"))
    q = np.asarray(a["q"][0, :, head], np.float64)
    logits = np.concatenate([q @ k.T, q @ own_k.T], axis=1) * SCALE
    seen = np.concatenate([np.ones((len(q), len(k)), bool), np.asarray(a["visible"][0])], axis=1)
    logits = np.where(seen, logits, -np.inf)
    if spec.op == "scores" and "lse" in a:
        lse = np.asarray(a["lse"][0, head], np.float64)[:, None]
    else:
        top = logits.max(1, keepdims=True)
        lse = top + np.log(np.exp(logits - top).sum(1, keepdims=True))
    p = np.exp(logits - lse)
    if spec.op == "scores":
        return p[:, : len(k)].mean(0)
    values = np.concatenate([np.asarray(a[n][0, 0], np.float64) for n in ("v", "own_v")])
    return p @ values


def repeated(f: Callable[[Any], Any], start: Any, smoke: bool) -> float:
    """Seconds of one `state = f(state)`, from loops of two lengths on the device: no dispatch.

    The lengths are constants: with an unknown trip count, the host is asked in every iteration.
    """

    def timed(times: int) -> Callable[[], float]:
        loop = jax.jit(
            lambda s: jax.lax.fori_loop(0, times, lambda _, s: f(s), s),
            compiler_options=compiler_options(),
        )

        def run() -> float:
            began = time.perf_counter()
            jax.block_until_ready(loop(start))
            return time.perf_counter() - began

        run()
        return run

    few = 2 if smoke else 10
    short = timed(few)
    many = few + (2 if smoke else int(min(max(0.1 * few / short(), 10), 1000)))
    long = timed(many)
    found = [(long() - short()) / (many - few) for _ in range(1 if smoke else 7)]
    return sorted(found)[len(found) // 2]


def operation_seconds(f: Callable[..., jax.Array], a: dict[str, jax.Array], smoke: bool) -> float:
    """Seconds of one call.

    Each call depends on the whole result of the one before, so XLA drops none. This dependence
    costs a small kernel (`ceilings`, "loop").
    """

    def body(state):
        q, _ = state
        out = f({**a, "q": q})
        finite = out.reshape(-1)[0].astype(jnp.float32) < 1e30
        return jnp.where(finite, q, jnp.zeros((), q.dtype)), out

    shape = jax.eval_shape(f, a)
    return repeated(body, (a["q"], jnp.zeros(shape.shape, shape.dtype)), smoke)


def _implementations() -> tuple[str, ...]:
    backend = jax.default_backend()
    return {"gpu": ("xla", "pallas_gpu"), "tpu": ("xla", "pallas_tpu")}.get(backend, ("xla",))


def _kernels(op: str, smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Every shape with every implementation that supports it, and the lower bound on this card."""
    for spec in specs(op, smoke):
        for name in _implementations():
            yield f"{spec.name} {name}", partial(_measure, spec, name, smoke, report)


def scoring(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Importance scoring."""
    return _kernels("scores", smoke, report)


def block_attention(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Attention of a few rows over a cache."""
    return _kernels("attention", smoke, report)


def floors(spec: Spec, limits: dict[str, Any]) -> dict[str, float]:
    """Lower bounds in seconds, one per resource, from the measured ceilings of the card."""
    sweeps = 1 if spec.known else 2
    return {
        "bytes": (spec.key_bytes + spec.output_bytes) / limits["bandwidth"]["per_s"],
        "flops": spec.flops / limits["matmul"]["per_s"],
        "exponentials": sweeps * spec.pairs / limits["exponentials"]["per_s"],
    }


def _measure(spec: Spec, name: str, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    """The error against float64, the time, and its ratio to the lower bound."""
    a = arguments(spec)
    f = partial(result, spec, name)
    got = jax.jit(f)(a)
    got = np.asarray(got[0, 0] if spec.op == "scores" else got[0, :, 0], np.float64)
    want = exact(spec, a)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error < 0.02:  # bfloat16 keeps 8 bits of probabilities and outputs
        raise ValueError(f"{name}: the error is {error:.2e} of the largest value")
    seconds = operation_seconds(f, a, smoke)
    found = {"ms": 1e3 * seconds, "relative_error": error, "bytes": spec.key_bytes}
    limits = report.get("ceilings", {})
    if all("per_s" in limits.get(part, {}) for part in ("bandwidth", "matmul", "exponentials")):
        seconds_at_least = floors(spec, limits)
        which = max(seconds_at_least, key=seconds_at_least.__getitem__)
        found |= {"floor_ms": 1e3 * seconds_at_least[which], "floor": which}
        found["times_floor"] = seconds / seconds_at_least[which]
    return found


def selection(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Selecting what one layer keeps: `select`, and its top-k alone; C = 128."""
    for tokens in (256,) if smoke else (8192, 32768, 131072):
        for label, f in (("select", _select), ("top_k", _top_k)):
            yield f"{label} {tokens}", partial(_choose, f, tokens, smoke)


def _top_k(a: dict[str, jax.Array]) -> jax.Array:
    return jax.lax.top_k(a["q"], min(128, a["q"].shape[-1] // 2))[1]


def _select(a: dict[str, jax.Array]) -> jax.Array:
    scores = a["q"]
    budget = min(128, scores.shape[-1] // 2)
    at = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]
    length = jnp.full(1, scores.shape[-1], jnp.int32)
    view: Any = SimpleNamespace(pos=at, length=length, window=None, pinned=None)
    limits = jnp.full(1, budget, jnp.int32)
    return select(Policy(), view, scores, budget=budget, layer_budget=limits, limit=budget).pos


def _choose(f: Callable[..., jax.Array], tokens: int, smoke: bool) -> dict[str, Any]:
    a = {"q": jax.random.uniform(jax.random.key(0), (1, 8, tokens), jnp.float32)}
    return {"ms": 1e3 * operation_seconds(f, a, smoke)}


def ceilings(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Peak rates of the card: bytes copied, bfloat16 products, float32 exponentials."""
    n = 256 if smoke else 8192

    def rate(f: Callable[[jax.Array], jax.Array], x: jax.Array, amount: float) -> dict[str, float]:
        return {"per_s": amount / repeated(f, x, smoke)}

    def bandwidth():
        x = jnp.zeros((n, 16 * n), jnp.bfloat16)
        return rate(lambda x: x + jnp.ones((), x.dtype), x, 2 * 2 * x.size)

    def matmul():
        # Normal entries of this size preserve the norm of the rows; zeros would draw less power.
        x, w = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
        w = w / jnp.asarray(n**0.5, w.dtype)
        return rate(lambda x: x @ w, x, 2.0 * n**3)

    def exponentials():
        def chain(x):
            for _ in range(64):
                x = jnp.exp2(-x)
            return x

        x = jnp.zeros((n, n // 8), jnp.float32)
        return rate(chain, x, 64.0 * x.size)

    def loop():
        a = {"q": jnp.zeros((8, 128), jnp.bfloat16)}
        return {
            "us": 1e6 * operation_seconds(lambda a: a["q"] * jnp.ones((), a["q"].dtype), a, smoke)
        }

    yield "bandwidth", bandwidth
    yield "matmul", matmul
    yield "exponentials", exponentials
    yield "loop", loop


SECTIONS = {
    "ceilings": ceilings, "scores": scoring, "attention": block_attention, "select": selection,
}  # fmt: skip
