"""What a decoding step costs on a CPU by the number of its rows, c(P) / c(1), beside the bytes.

A step of P rows verifies a draft of P nodes. It reads every weight once, whatever P is; the floor
is that read, at the speed at which this machine sums an array of the size of the weights. Each step
is timed with the products and attention of few rows (kernels/few_rows_cpu.py, attention_cpu.py) and
with XLA's alone, unless these are left out: they slow the steps behind them. All steps take turns,
and ratios are medians of those within a turn.

    python benchmarks/step_cost.py --model smollm2
    python benchmarks/step_cost.py --model smollm2 --weights int8 --out \\
        benchmarks/results/step_cost_int8.json
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

from common import RESULTS, Help, machine, parse, publish, ran_on, settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    model: Annotated[str, Help("checkpoint, as for --model of the commands")] = "smollm2"
    dtype: Annotated[str, Help("type of weights and cache", choices=("float32", "bfloat16"))] = (
        "float32"
    )
    weights: Annotated[str | None, Help("weights in eight bits", choices=("int8",))] = None
    entries: Annotated[int, Help("entries of the cache per layer and head")] = 256
    rows: Annotated[tuple[int, ...], Help("rows of the steps")] = (1, 2, 4, 8, 16, 32, 64)
    without_xla: Annotated[bool, Help("leave out the steps with XLA's products and attention")] = (
        False
    )
    repetitions: Annotated[int, Help("timings of each step")] = 15
    out: Annotated[Path, Help("file of the report")] = RESULTS / "step_cost.json"


def seconds(call: Any) -> float:
    import jax

    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def measure(options: Options) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    import lookahead_jax as lk
    from lookahead_jax.decoding.weights import for_decoding
    from lookahead_jax.kernels import dispatch
    from lookahead_jax.model import layers
    from lookahead_jax.model.cache import empty_cache

    model = lk.load(options.model, dtype=options.dtype, weights=options.weights)
    config, params = model.config, for_decoding(model.params)
    span = jnp.full(1, options.entries, jnp.int32)
    cache = empty_cache(config, 1, options.entries, jnp.dtype(options.dtype), span)
    at = jnp.arange(options.entries, dtype=jnp.int32)
    cache = dataclasses.replace(
        cache,
        pos=jnp.broadcast_to(at, cache.pos.shape),
        length=jnp.full_like(cache.length, options.entries),
        next_pos=jnp.full_like(cache.next_pos, options.entries),
    )

    def step(params, cache, tokens):
        positions = cache.next_pos[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        block = lk.Block(lk.embed(params, tokens, config=config), positions, cache.rope_span)
        hidden = lk.forward(params, block, cache, config=config).hidden
        return lk.logits(params, hidden, config=config)

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    summed = jax.jit(lambda x: x.reshape(2, -1).sum(1))
    array = jnp.ones(size // 8 * 2, jnp.float32)
    jax.block_until_ready(summed(array))
    read = min(seconds(lambda: summed(array)) for _ in range(options.repetitions))
    programs = {}
    for rows in options.rows:
        tokens = jnp.arange(rows, dtype=jnp.int32)[None]
        forms = {"few_rows": jax.jit(step).lower(params, cache, tokens).compile()}
        if not options.without_xla:
            with (
                mock.patch.object(layers, "takes", return_value=False),
                mock.patch.object(dispatch, "preferred", return_value="xla"),
            ):
                plain = jax.jit(lambda *args: step(*args)).lower(params, cache, tokens)
                forms["xla"] = plain.compile()
        programs[rows] = tokens, forms
    times = {(rows, form): [] for rows, (_, forms) in programs.items() for form in forms}
    # All of them by turns: another machine's work on these cores then slows every one.
    for turn in range(options.repetitions + 1):
        for rows, (tokens, forms) in programs.items():
            for form, run in forms.items():
                took = seconds(lambda run=run, tokens=tokens: run(params, cache, tokens))
                if turn:
                    times[rows, form].append(took)
    return [
        {
            "rows": rows,
            "ms": {form: 1e3 * statistics.median(times[rows, form]) for form in forms},
            **(
                {}
                if options.without_xla
                else {"ratio": median_ratio(times[rows, "xla"], times[rows, "few_rows"])}
            ),
            "c": {
                form: median_ratio(times[rows, form], times[options.rows[0], form])
                for form in forms
            },
            "floor_ms": 1e3 * read,
        }
        for rows, (_, forms) in programs.items()
    ]


def median_ratio(these: list[float], those: list[float]) -> float:
    """The median of the ratios of times that were taken in the same turns."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def main() -> None:
    options = parse(Options, __doc__)
    rows = measure(options)
    for row in rows:
        print(row, flush=True)
    report = ran_on() | {
        "processor": machine(),
        "settings": settings(options, "out"),
        "steps": rows,
    }
    publish(report, options.out)


if __name__ == "__main__":
    main()
