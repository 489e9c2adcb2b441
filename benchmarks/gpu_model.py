"""Sections of gpu.py that run models: an 8B-shaped random one in bfloat16, and the embedded one."""

import contextlib
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gpu_subject import POLICIES, filled_cache, one_step, opened, random_modules, step_bytes

import lookahead_jax as lk
from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.decoding.step import decode_burst
from lookahead_jax.kernels import dispatch
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import compiler_options
from lookahead_jax.model.params import init_params, unstack
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import observer_block
from lookahead_jax.policies.base import WithModules
from lookahead_jax.prefilling.prefill import prefill
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.flops import training_flops
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.shapes import SHAPES
from lookahead_jax.train.step import compile_step, init_state

Item = tuple[str, Callable[[], Any]]
KERNELS = ("xla", "pallas_gpu") if jax.default_backend() == "gpu" else ("default",)
TOY = dict(
    vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=128,
)  # fmt: skip


@functools.cache
def model(smoke: bool) -> tuple[ModelConfig, Any, Any]:
    """Configuration, random weights and lookahead modules."""
    config = config_from_hf({**SHAPES["llama-3.1-8b"], **(TOY if smoke else {})})
    params = jax.jit(partial(init_params, config=config, dtype=jnp.bfloat16))(jax.random.key(0))
    return config, params, random_modules(config)


def prompt(tokens: int, config: ModelConfig) -> jax.Array:
    """One row of random tokens."""
    return jax.random.randint(jax.random.key(2), (1, tokens), 0, config.vocab_size, jnp.int32)


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Programs traced inside use this implementation of scoring and attention where it applies."""
    if name == "default":
        yield
        return
    before = dispatch.preferred
    try:
        dispatch.preferred = lambda head_dim: name
        jax.clear_caches()
        yield
    finally:
        dispatch.preferred = before
        jax.clear_caches()


def median_seconds(run: Callable[[], Any], repetitions: int) -> float:
    """Times of several runs, after one that compiles."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def ttft(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Seconds to the first token's logits: prefill alone, and with each policy, C = 128."""
    for tokens in (64,) if smoke else (8192, 32768):
        yield f"{tokens} tokens", partial(_ttft, tokens, tuple(POLICIES), smoke)


def _ttft(tokens: int, labels: tuple[str, ...], smoke: bool) -> dict[str, Any]:
    """All policies in turn, so that a slow period of the card affects each of them."""
    config, params, modules = model(smoke)
    text, budget = prompt(tokens, config), 16 if smoke else 128

    def read(label: str) -> float:
        name, fields = POLICIES[label]
        began = time.perf_counter()
        found = lk.read_prompt(
            params, text, config=config, policy=lk.make_policy(name, **fields), budget=budget,
            new_tokens=64, modules=modules,
        )  # fmt: skip
        jax.block_until_ready(found.logits)
        return time.perf_counter() - began

    taken: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    for label in labels:
        try:
            read(label)  # compiles
            taken[label] = []
        except Exception as error:  # one policy does not fit or is not supported
            found[label] = f"failed: {str(error)[:200]}"
    order = list(taken)
    rounds = 1 if smoke or not taken else int(min(max(40 / (len(taken) * read(order[0])), 2), 20))
    for i in range(rounds):
        for label in order[i % len(order) :] + order[: i % len(order)]:
            taken[label].append(read(label))
    alone = taken.get("prefill alone")
    for label, seconds in taken.items():
        found[label] = {"s": statistics.median(seconds)}
        if alone is not None and seconds is not alone:
            added = statistics.median(s - a for s, a in zip(seconds, alone, strict=True))
            share = 100 * added / statistics.median(alone)
            found[label] |= {"added_ms": 1e3 * added, "added_percent": share}
    return {"rounds": rounds, **found}


def long(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """128K tokens: decoding from the full cache, and the time to the first token."""
    entries = 128 if smoke else 131072
    for name in KERNELS:
        yield f"{entries} entries {name}", partial(_decode, entries, name, smoke, report)
    labels = ("prefill alone", "lookaheadkv", "snapkv")
    yield f"{entries} tokens", partial(_ttft, entries, labels, smoke)


def decode(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Milliseconds per token, batch 1, greedy, with the full cache and with budgets."""
    for entries in (32, 64) if smoke else (1024, 32768, 128, 8192, 2048):
        for name in KERNELS if smoke or entries in (1024, 32768) else KERNELS[:1]:
            yield f"{entries} entries {name}", partial(_decode, entries, name, smoke, report)


def _decode(entries: int, name: str, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    with implementation(name):
        return _decode_by(decode_burst, model(smoke)[1], entries, smoke, report)


def _decode_by(
    burst: Callable[..., Any], params: Any, entries: int, smoke: bool, report: dict[str, Any]
) -> dict[str, Any]:
    config = model(smoke)[0]
    steps = 4 if smoke else 64

    def run(count: int) -> float:
        state = jax.block_until_ready(opened(entries, steps, config))
        began = time.perf_counter()
        jax.block_until_ready(
            burst(params, state, config=config, steps=jnp.asarray(count, jnp.int32))
        )
        return time.perf_counter() - began

    run(1)
    few = steps // 4
    found = [(run(steps) - run(few)) / (steps - few) for _ in range(1 if smoke else 5)]
    seconds = statistics.median(found)
    result = {"ms": 1e3 * seconds, "tokens_per_s": 1 / seconds}
    speed = report.get("ceilings", {}).get("bandwidth", {}).get("per_s")
    if speed is not None:
        nbytes = step_bytes(entries, params, config)
        result["of_bandwidth_floor"] = nbytes / speed / seconds
    return result


def compilers(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Decoding from 1,024 entries, compiled as the library does it and in other ways."""
    for label, options, apart in (
        ("library", compiler_options(), False),
        ("XLA's own options", {}, False),
        ("XLA's own options, weights apart", {}, True),
    ):
        yield label, partial(_compiled, options, apart, smoke, report)


def graph(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """The same with all layers in one CUDA graph; `gpu.ENVIRONMENT` must allow loops in graphs."""
    options = {k: v for k, v in compiler_options().items() if "command_buffer" not in k}
    yield "all layers", partial(_compiled, options, False, smoke, report)


def _compiled(options: Any, apart: bool, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    burst = jax.jit(
        lambda *a, **k: decode_burst(*a, **k), static_argnames="config", donate_argnums=1,
        compiler_options=options,
    )  # fmt: skip
    params = model(smoke)[1]
    params = unstack(params) if apart else params
    return _decode_by(burst, params, 64 if smoke else 1024, smoke, report)


def steps(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """One step of the model over P nodes at C = 1024, and over one node."""
    for name in KERNELS:
        for nodes in (1, 2, 4) if smoke else (1, 64, 16, 128, 4, 32, 8, 2):
            yield f"{nodes} nodes {name}", partial(_step, nodes, name, smoke, report)
            if name == "pallas_gpu" and nodes == 64:
                return  # one node and 64 are enough for a comparison


def _step(nodes: int, name: str, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    with implementation(name):
        seconds = _step_seconds(nodes, smoke)
    one = report.get("steps", {}).get(f"1 nodes {name}", {}).get("ms")
    found = {"ms": 1e3 * seconds}
    return found if one is None else {**found, "times_one_node": 1e3 * seconds / one}


def _step_seconds(nodes: int, smoke: bool) -> float:
    config, params, _ = model(smoke)
    entries = 64 if smoke else 1024
    cache = filled_cache(entries, 128, config)
    tokens = prompt(nodes, config)
    step = jax.jit(partial(one_step, entries, config), compiler_options=compiler_options())

    def ten():
        chosen = tokens
        for _ in range(10):
            chosen = step(params, cache, chosen.astype(jnp.int32))
        return chosen

    return median_seconds(ten, 1 if smoke else 7) / 10


def memory(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Bytes that the compiled prefill allocates: arguments, results and temporaries."""
    for tokens in (64,) if smoke else (8192, 32768, 131072):
        for label in ("prefill alone", "lookaheadkv"):
            yield f"{label} {tokens}", partial(_memory, label, tokens, smoke)


def _memory(label: str, tokens: int, smoke: bool) -> dict[str, Any]:
    config, params, modules = model(smoke)
    policy, budget = lk.make_policy(POLICIES[label][0]), 16 if smoke else 128
    length = jnp.full(1, tokens, jnp.int32)
    dtype = params["embed"].dtype
    observer = None
    if isinstance(policy.reading, WithModules):
        observer = observer_block(modules, length, length + 64, dtype=dtype)
    used = prefill.lower(
        params, prompt(tokens, config), config=config, policy=policy, budget=budget,
        slots=lk.slots_for(policy, tokens, budget, 64, config=config), new_tokens=64,
        observer=observer,
    ).compile().memory_analysis()  # fmt: skip
    parts = {
        "arguments": used.argument_size_in_bytes,
        "results": used.output_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
    }
    return {**parts, "gib": sum(parts.values()) / 2**30}


def train(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Seconds of a training step, one row of a prompt and 512 response tokens."""
    for tokens in (64,) if smoke else (16384, 8192):
        yield f"{tokens} tokens", partial(_train, tokens, smoke, report)


def _train(tokens: int, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    config, params, modules = model(smoke)
    response = 16 if smoke else 512
    optimizer = make_optimizer(OptimizerConfig(rate=1e-3, warmup=10), steps=100)
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = Batch(prompt(tokens, config)[None], prompt(response, config)[None])
    with jax.set_mesh(mesh):
        step = compile_step(mesh, config=config, optimizer=optimizer, chunk=None)

        def run():
            return step(params, init_state(jax.tree.map(jnp.copy, modules), optimizer), batch)[1]

        seconds = median_seconds(run, 1 if smoke else 5)
    flops = training_flops(config, tokens, response, 32)
    found = {"s": seconds, "tflops_per_s": flops / seconds / 1e12}
    peak = report.get("ceilings", {}).get("matmul", {}).get("per_s")
    return found if peak is None else {**found, "of_matmul_peak": flops / seconds / peak}


def drafting(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """The embedded model continues its example text, with and without drafters."""
    for name in ("none", "prompt_lookup") if smoke else ("none", "prompt_lookup", "trie", "suffix"):
        yield name, partial(_drafting, name, smoke)


def _drafting(name: str, smoke: bool) -> dict[str, Any]:
    loaded = lk.load(lk.EMBEDDED_MODEL)
    text = (lk.EMBEDDED_MODEL.parent / "example.txt").read_text()[: 600 if smoke else 5000]
    result = lk.generate(
        loaded, [text], policy=lk.make_policy("full"), max_new_tokens=8 if smoke else 256,
        drafter=name, measure=not smoke,
    )  # fmt: skip
    return {"tokens": len(result.tokens[0]), **{k: v for k, v in vars(result.timing).items() if v}}


def peer(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """transformers + kvpress: seconds to the first token of an 8B-shaped random model."""
    for tokens in (128,) if smoke else (8192, 32768):
        for press in (None, "snapkv"):
            yield f"{press or 'full'} {tokens}", partial(_peer, press, tokens, smoke)


@functools.cache
def peer_model(smoke: bool) -> Any:
    """The same shape with random weights, in bfloat16 on the card."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {k: v for k, v in SHAPES["llama-3.1-8b"].items() if k != "model_type"}
    settings |= TOY if smoke else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def _peer(press: str | None, tokens: int, smoke: bool) -> dict[str, Any]:
    wanted = ["torch", "transformers", *(["kvpress"] if press else [])]
    missing = [name for name in wanted if not importlib.util.find_spec(name)]
    if missing:
        return {"row": f"not run: {', '.join(missing)} not installed"}
    import torch
    import transformers

    net, budget = peer_model(smoke), 16 if smoke else 128
    if net.device.type != "cuda" and not smoke:
        return {"row": "not run: torch sees no card"}
    ids = torch.randint(0, net.config.vocab_size, (1, tokens), device=net.device)

    def pressed() -> Any:
        if press is None:
            return contextlib.nullcontext()
        from kvpress import SnapKVPress

        return SnapKVPress(compression_ratio=1 - budget / tokens, window_size=64)(net)

    def run() -> float:
        began = time.perf_counter()
        with torch.no_grad(), pressed():
            net(ids, logits_to_keep=1)
        if net.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run()
    found = [run() for _ in range(1 if smoke else 7)]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"s": statistics.median(found), **versions}


SECTIONS = {
    "ttft": ttft, "decode": decode, "compilers": compilers, "graph": graph, "steps": steps,
    "long": long, "train": train, "peer": peer, "drafting": drafting, "memory": memory,
}  # fmt: skip
