"""Sections of gpu.py that run models: an 8B-shaped random one in bfloat16, and the embedded one."""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import lookahead_jax as lk
from lookahead_jax.config import ModelConfig
from lookahead_jax.decoding import decode_burst, start
from lookahead_jax.lookahead import TARGETS, LookaheadConfig, init_modules, observer_block
from lookahead_jax.model import Block, forward
from lookahead_jax.params import init_params
from lookahead_jax.prefill import prefill
from lookahead_jax.sampling import GREEDY, sampling_rows
from lookahead_jax.sharding import make_mesh
from lookahead_jax.train.compile import training_flops
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.shapes import SHAPES
from lookahead_jax.train.step import Batch, compile_step, init_state

Item = tuple[str, Callable[[], Any]]
POLICIES = {
    "prefill alone": ("full", {}),
    "lookaheadkv": ("lookaheadkv", {}),
    "snapkv": ("snapkv", {}),
    "laq": ("laq", {}),
}
TOY = dict(
    vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=128,
)  # fmt: skip


@functools.cache
def model(smoke: bool) -> tuple[ModelConfig, Any, Any]:
    """Configuration, random weights and lookahead modules."""
    config = ModelConfig.from_hf({**SHAPES["llama-3.1-8b"], **(TOY if smoke else {})})
    params = jax.jit(partial(init_params, config=config, dtype=jnp.bfloat16))(jax.random.key(0))
    sizes = LookaheadConfig(tokens=32, rank=8, alpha=32.0, targets=tuple(TARGETS), init="normal")
    return config, params, init_modules(jax.random.key(1), sizes, config)


def prompt(tokens: int, config: ModelConfig) -> jax.Array:
    """One row of random tokens."""
    return jax.random.randint(jax.random.key(2), (1, tokens), 0, config.vocab_size, jnp.int32)


def median_seconds(run: Callable[[], Any], repetitions: int) -> float:
    """Of several runs, after one that compiles."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def ttft(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Seconds to the first token's logits: prefill alone, and with each policy, C = 128."""
    for tokens in (64,) if smoke else (8192, 32768, 131072):
        for label in POLICIES:
            yield f"{label} {tokens}", partial(_ttft, label, tokens, smoke, report)


def _ttft(label: str, tokens: int, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    config, params, modules = model(smoke)
    name, fields = POLICIES[label]
    policy, budget = lk.make_policy(name, **fields), 16 if smoke else 128

    def run():
        return lk.read_prompt(
            params, prompt(tokens, config), config=config, policy=policy, budget=budget,
            new_tokens=64, modules=modules,
        ).logits  # fmt: skip

    seconds = median_seconds(run, 1 if smoke else 7)
    found = {"s": seconds}
    alone = report.get("ttft", {}).get(f"prefill alone {tokens}", {}).get("s")
    if alone is not None:
        found |= {"added_ms": 1e3 * (seconds - alone), "added_percent": 100 * (seconds / alone - 1)}
    return found


def filled_cache(entries: int, room: int, config: ModelConfig) -> lk.KVCache:
    """A cache of one row that holds `entries` random keys and values per head."""
    slots = -(-(entries + room) // 128) * 128
    shape = (config.num_layers, 1, config.num_kv_heads, slots)
    make = partial(jax.random.normal, shape=(*shape, config.head_dim), dtype=jnp.bfloat16)
    slot = jnp.arange(slots, dtype=jnp.int32)
    return lk.KVCache(
        k=make(jax.random.key(3)),
        v=make(jax.random.key(4)),
        pos=jnp.broadcast_to(jnp.where(slot < entries, slot, -1), shape),
        length=jnp.full(shape[:3], entries, jnp.int32),
        next_pos=jnp.full(1, entries, jnp.int32),
        rope_span=jnp.full(1, entries + room, jnp.int32),
    )


def _step_bytes(cache: lk.KVCache, entries: int, params: Any) -> int:
    """Weights but the embedding table (a step reads one row of it), and the filled slots."""
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
    weights -= params["embed"].size * params["embed"].dtype.itemsize
    return weights + (cache.k.nbytes + cache.v.nbytes) * entries // cache.slots


def decode(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Milliseconds a token, batch 1, greedy, at a full cache and at budgets."""
    for entries in (32, 64) if smoke else (128, 256, 512, 1024, 2048, 8192, 32768, 131072):
        yield f"{entries} entries", partial(_decode, entries, smoke, report)


def _decode(entries: int, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    config, params, _ = model(smoke)
    steps = 4 if smoke else 128

    def run(count: int) -> float:
        cache = filled_cache(entries, steps, config)
        state = start(
            cache, jnp.zeros((1, config.vocab_size), jnp.float32),
            sampling=sampling_rows([GREEDY], [0], config.vocab_size),
            limit=jnp.full(1, steps + 1, jnp.int32), eos=jnp.full(1, -1, jnp.int32),
            seen=None, width=steps + 1,
        )  # fmt: skip
        jax.block_until_ready(state)
        began = time.perf_counter()
        jax.block_until_ready(
            decode_burst(params, state, config=config, steps=jnp.asarray(count, jnp.int32))
        )
        return time.perf_counter() - began

    run(1)
    few = steps // 4
    found = [(run(steps) - run(few)) / (steps - few) for _ in range(1 if smoke else 5)]
    seconds = statistics.median(found)
    result = {"ms": 1e3 * seconds, "tokens_per_s": 1 / seconds}
    speed = report.get("ceilings", {}).get("bandwidth", {}).get("per_s")
    if speed is not None:
        nbytes = _step_bytes(filled_cache(entries, steps, config), entries, params)
        result["of_bandwidth_floor"] = nbytes / speed / seconds
    return result


def steps(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """One step of the model over P nodes at C = 1024, and over one node."""
    for nodes in (1, 2, 4) if smoke else (1, 2, 4, 8, 16, 32, 64, 128):
        yield f"{nodes} nodes", partial(_step, nodes, smoke, report)


def _step(nodes: int, smoke: bool, report: dict[str, Any]) -> dict[str, Any]:
    config, params, _ = model(smoke)
    entries = 64 if smoke else 1024
    cache = filled_cache(entries, 128, config)
    tokens = prompt(nodes, config)
    positions = entries + jnp.arange(nodes, dtype=jnp.int32)[None]

    @jax.jit
    def step(params, cache, tokens):
        block = Block(lk.embed(params, tokens, config=config), positions, cache.rope_span)
        hidden = forward(params, block, cache, config=config).hidden
        return lk.logits(params, hidden, config=config).argmax(-1)

    def ten():
        chosen = tokens
        for _ in range(10):
            chosen = step(params, cache, chosen.astype(jnp.int32))
        return chosen

    seconds = median_seconds(ten, 1 if smoke else 7) / 10
    one = report.get("steps", {}).get("1 nodes", {}).get("ms")
    found = {"ms": 1e3 * seconds}
    return found if one is None else {**found, "times_one_node": 1e3 * seconds / one}


def memory(smoke: bool, report: dict[str, Any]) -> Iterator[Item]:
    """Bytes that the compiled prefill allocates: arguments, results and temporaries."""
    for tokens in (64,) if smoke else (8192, 32768, 131072):
        for label in ("prefill alone", "lookaheadkv", "snapkv"):
            yield f"{label} {tokens}", partial(_memory, label, tokens, smoke)


def _memory(label: str, tokens: int, smoke: bool) -> dict[str, Any]:
    config, params, modules = model(smoke)
    policy, budget = lk.make_policy(POLICIES[label][0]), 16 if smoke else 128
    length = jnp.full(1, tokens, jnp.int32)
    observer = observer_block(modules, length, length + 64) if policy.uses_modules else None
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
    for tokens in (64,) if smoke else (8192, 16384):
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
    for tokens in (64,) if smoke else (8192, 32768):
        for press in (None, "snapkv"):
            yield f"{press or 'full'} {tokens}", partial(_peer, press, tokens, smoke)


def _peer(press: str | None, tokens: int, smoke: bool) -> dict[str, Any]:
    missing = [p for p in ("torch", "transformers", "kvpress") if not importlib.util.find_spec(p)]
    if missing or smoke:
        return {"row": f"not run: {', '.join(missing) or 'toy sizes'} not installed"}
    import contextlib

    import torch
    from kvpress import SnapKVPress
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {k: v for k, v in SHAPES["llama-3.1-8b"].items() if k != "model_type"}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        net = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    ids = torch.randint(0, settings["vocab_size"], (1, tokens), device="cuda")
    ratio = 1 - 128 / tokens

    def run():
        chosen = SnapKVPress(compression_ratio=ratio)(net) if press else contextlib.nullcontext()
        with torch.no_grad(), chosen:
            net(ids, logits_to_keep=1)
        torch.cuda.synchronize()

    run()
    found = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return {"s": statistics.median(found), "torch": torch.__version__}
