"""How often the same request gives other tokens when its sums are grouped differently.

Two groupings of the same sums round differently, so a decision between two logits that nearly tie
may change. Prompts are windows of the packaged example, greedy, on the embedded model: each alone,
in batches of 8 with other lengths and paddings, and in steps of 16 nodes with two drafters. The
tests demand equality in float32 with highest precision; bfloat16 is only recorded.

    python benchmarks/near_ties.py --dtype float32 --out benchmarks/results/near_ties.json
    python benchmarks/near_ties.py --dtype bfloat16 --out benchmarks/results/near_ties_bf16.json
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from common import Help, commit, parse, publish, settings

import lookahead_jax as lk
from lookahead_jax.drafters.registry import make_drafter

BATCH, NEW_TOKENS, BUDGET, NODES = 8, 48, 96, 16
DRAFTERS = ("trie", "recycling")


def margin(model, prompt: list[int], policy, emitted: list[int]) -> float:
    """Gap between the two best logits, relative to the largest, at the last token of `emitted`."""
    read = lk.read_prompt(
        model.params, jnp.asarray(lk.pad_batch([prompt], config=model.config)),
        config=model.config, policy=policy, budget=BUDGET, new_tokens=NEW_TOKENS,
    )  # fmt: skip
    logits = np.asarray(read.logits[0])
    if emitted[:-1]:
        fed = jnp.asarray([emitted[:-1]], jnp.int32)
        _, after = lk.extend(model.params, fed, read.cache, config=model.config)
        logits = np.asarray(after[0])
    first, second = np.sort(logits)[::-1][:2]
    return float((first - second) / np.abs(logits).max())


def compare(model, prompts, policy, mine, theirs) -> dict:
    """Rows that differ, the first differing position, and the gap of the logits there (`mine`)."""
    at, margins = [], []
    for prompt, one, other in zip(prompts, mine, theirs, strict=True):
        different = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if different:
            at.append(different[0])
            margins.append(margin(model, prompt, policy, one[: different[0] + 1]))
    shares = {"p50": 0.5, "p90": 0.9, "max": 1.0} if at else {}
    return {
        "rows_equal": 1 - len(at) / len(prompts),
        "first_differences": len(at),
        "decisions_up_to_there": sum(at) + len(at) + (len(prompts) - len(at)) * NEW_TOKENS,
        "margin_at_a_first_difference": {
            name: float(np.quantile(margins, share)) for name, share in shares.items()
        },
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    rows: Annotated[int, Help("requests")] = 64
    seed: Annotated[int, Help("seed of the prompts")] = 0
    dtype: Annotated[str, Help("type of the weights", ("float32", "bfloat16"))] = "float32"
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def main() -> None:
    options = parse(Options, __doc__)
    jax.config.update("jax_default_matmul_precision", "highest")
    model = lk.load(lk.EMBEDDED_MODEL, dtype=options.dtype)
    text = model.tokenizer.encode((lk.EMBEDDED_MODEL.parent / "example.txt").read_text("utf-8"))
    rng = np.random.default_rng(options.seed)
    prompts = []
    for _ in range(options.rows):
        length = int(rng.integers(100, 500))
        begin = int(rng.integers(0, len(text) - length))
        prompts.append(text[begin : begin + length])

    policy = lk.make_policy("snapkv")
    arguments = dict(policy=policy, budget=BUDGET, max_new_tokens=NEW_TOKENS, eos_ids=())
    alone = [lk.generate(model, [p], **arguments).tokens[0] for p in prompts]
    together = [
        tokens
        for i in range(0, len(prompts), BATCH)
        for tokens in lk.generate(model, prompts[i : i + BATCH], **arguments).tokens
    ]
    report = {"batches": compare(model, prompts, policy, alone, together)}
    for name in DRAFTERS:
        drafter, drafted, steps = make_drafter(name), [], 0
        for prompt in prompts:
            result = lk.generate(model, [prompt], drafter=drafter, draft_nodes=NODES, **arguments)
            drafted.append(result.tokens[0])
            steps += result.drafting.steps
        emitted = len(prompts) * (NEW_TOKENS - 1)
        report[name] = compare(model, prompts, policy, alone, drafted) | {
            "nodes": NODES,
            "emitted_per_step": round(emitted / steps, 3),
        }
    about = {"commit": commit(), "jax": jax.__version__, **settings(options, "out")}
    publish({**about, **report}, options.out, indent=2)


if __name__ == "__main__":
    main()
