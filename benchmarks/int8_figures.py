"""What int8 weights and int8 caches take and what they cost: bytes of an 8B model, perplexity.

Memory is what XLA's memory_analysis says of a decoding step of Llama 3.1 8B, compiled ahead of time
for one chip that is not there: a TPU's (extra tpu-aot), or a card of benchmarks/cards (packages as
in gpu_estimate.py). Perplexity is that of the second half of pieces of text after a cache that
holds the first half whole.

    python benchmarks/int8_figures.py --chip v5p:2x2x1 --out benchmarks/results/int8_memory.json
    python benchmarks/int8_figures.py --chip h200 --out benchmarks/results/int8_memory_h200.json
    python benchmarks/int8_figures.py --model smollm2 --texts docs/decisions.md \\
        --out benchmarks/results/int8_quality.json
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import gpu_estimate
from common import Help, parse, publish, ran_on, settings

KINDS = (None, "int8")
Compile = Callable[[Any, Any], Any]  # a function and the shapes of its arguments -> the program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    chip: Annotated[
        str | None, Help("TPU topology to compile for (v5p:2x2x1, ...), or h100 or h200")
    ] = None
    slots: Annotated[int, Help("slots of the cache per layer and head")] = 32768
    model: Annotated[str | None, Help("checkpoint whose perplexity to measure")] = None
    texts: Annotated[tuple[str, ...], Help("text files the model has not seen")] = ()
    pieces: Annotated[int, Help("pieces of text")] = 8
    tokens: Annotated[int, Help("tokens of a piece; the second half is scored")] = 1024
    whole: Annotated[bool, Help("score whole pieces without a cache: weights only")] = False
    out: Annotated[Path | None, Help("file of the report")] = None
    child: Annotated[bool, Help(None)] = False


def compile_for_card(name: str) -> Compile:
    """Compiles for an NVIDIA card."""
    card = gpu_estimate.Card(name)
    return lambda f, shapes: card.compile(f, *card.put(shapes))


def compile_for_tpu(topology: str) -> Compile:
    """Compiles for one chip of a TPU topology."""
    defaults = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    from lookahead_jax.model.sharding import make_mesh, sharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(devices=devices[:1])

    def compiled(f: Any, shapes: Any) -> Any:
        placed = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding((), mesh)), shapes
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.jit(f).lower(*placed).compile()

    return compiled


def memory(chip: str, slots: int) -> dict[str, Any]:
    """Bytes of arguments and temporaries of a step over one row, by kinds of weights and cache."""
    import jax
    import jax.numpy as jnp

    import lookahead_jax as lk
    from lookahead_jax.model.cache import empty_cache
    from lookahead_jax.model.params import abstract_params
    from lookahead_jax.train.shapes import SHAPES

    config = lk.config_from_hf(SHAPES["llama-3.1-8b"])
    compiled = (compile_for_card if chip in gpu_estimate.BANDWIDTH else compile_for_tpu)(chip)

    def step(params, cache, token):
        block = lk.Block(
            lk.embed(params, token, config=config), cache.next_pos[:, None], cache.rope_span
        )
        hidden = lk.forward(params, block, cache, config=config).hidden
        return lk.logits(params, hidden, config=config).argmax(-1)

    def measure(weights: Any, cache_dtype: str | None, slots: int) -> Any:
        row = jnp.zeros(1, jnp.int32)
        cache = jax.eval_shape(
            lambda: empty_cache(config, 1, slots, cache_dtype or jnp.bfloat16, row)
        )
        shapes = abstract_params(config, jnp.bfloat16, weights), cache
        shapes = (*shapes, jax.ShapeDtypeStruct((1, 1), jnp.int32))
        try:
            found: Any = compiled(step, shapes).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None  # more than the chip has
        return {
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
        }

    found: dict[str, Any] = {"chip": chip, "slots": slots}
    for weights in KINDS:
        found[f"{weights or 'bfloat16'} weights, 128 slots"] = measure(weights, None, 128)
        for kind in KINDS:
            name = f"{weights or 'bfloat16'} weights, {kind or 'bfloat16'} cache"
            found[name] = measure(weights, kind, slots)
    return found


def quality(options: Options, folder: str) -> dict[str, Any]:
    """Perplexity with floats, int8 weights, an int8 cache, and both.

    Relative to floats with a 95 % interval: Student's, of the paired differences between pieces.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import lookahead_jax as lk
    from lookahead_jax.eval.intervals import of_mean
    from lookahead_jax.generation.score import forced_logits

    half = options.tokens // 2
    policy = lk.make_policy("full")
    # Read once: a text that is edited meanwhile would be another one for every kind of weights.
    text = "\n".join(Path(name).read_text("utf-8") for name in options.texts)
    found: dict[str, Any] = {}
    for weights in KINDS:
        model = lk.load(folder, dtype="float32", weights=weights)
        if model.tokenizer is None:
            raise SystemExit(f"{folder} has no tokenizer")
        ids = model.tokenizer.encode(text)
        if len(ids) < options.pieces * options.tokens:
            raise SystemExit(f"the texts have {len(ids)} tokens: give more, or fewer --pieces")
        for cache in KINDS:
            read = partial(
                lk.prefill, model.params, config=model.config, policy=policy, budget=half,
                slots=half, cache_dtype=cache,
            )  # fmt: skip
            if options.whole and cache is not None:
                continue
            loss = []
            for piece in range(options.pieces):
                row = ids[piece * options.tokens : (piece + 1) * options.tokens]
                if options.whole:
                    forced = jnp.asarray([row[1:]], jnp.int32)
                    tokens = jnp.asarray([row], jnp.int32)
                    scores = lk.token_logits(model.params, tokens, config=model.config)[:, :-1]
                else:
                    first = read(jnp.asarray([row[:half]], jnp.int32))
                    forced = jnp.asarray([row[half:]], jnp.int32)
                    scores = forced_logits(
                        model.params, first.cache, first.logits, forced, config=model.config
                    )
                chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), forced[..., None], -1)
                loss.append(-float(chosen.mean()))
            name = f"weights_{weights or 'float32'}_cache_{cache or 'float32'}"
            print(name, loss, file=sys.stderr, flush=True)
            found[name] = {"perplexity": float(np.exp(np.mean(loss))), "piece_losses": loss}
    floats = np.asarray(found["weights_float32_cache_float32"]["piece_losses"])
    for row in found.values():
        more = np.asarray(row["piece_losses"]) - floats
        row["relative"] = float(np.expm1(more.mean()))
        row["interval"] = np.expm1(of_mean(more)).tolist()
    scored = options.tokens - (1 if options.whole else half)
    return found | {"scored_tokens": options.pieces * scored}


def main() -> None:
    options = parse(Options, __doc__)
    if options.chip in gpu_estimate.BANDWIDTH and not options.child:
        # The compiler's folder must be known before JAX starts.
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env=gpu_estimate.environment()).returncode)
    report: dict[str, Any] = ran_on() | {"settings": settings(options, "out", "child")}
    if options.chip is not None:
        report["memory"] = memory(options.chip, options.slots)
    if options.model is not None:
        report["quality"] = quality(options, options.model)
    publish(report, options.out)


if __name__ == "__main__":
    main()
