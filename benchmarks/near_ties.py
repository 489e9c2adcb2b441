"""How often the same request ends differently alone and in a batch, and how close the call was.

Two groupings of the same float32 sums round differently, so a decision whose two best logits
nearly tie may fall either way. Prompts are windows of the packaged example, greedy, on the model
inside the package: each alone, and in batches of 8 with other lengths and paddings.

    python benchmarks/near_ties.py
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

import lookahead_jax as lk

BATCH, NEW_TOKENS, BUDGET = 8, 48, 96


def margin(model, prompt: list[int], policy, emitted: list[int]) -> float:
    """Gap between the two best logits, over the largest, where the last of `emitted` was chosen."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    model = lk.load(lk.EMBEDDED_MODEL, dtype=jnp.float32)
    text = model.tokenizer.encode((lk.EMBEDDED_MODEL.parent / "example.txt").read_text("utf-8"))
    rng = np.random.default_rng(options.seed)
    prompts = []
    for _ in range(options.rows):
        length = int(rng.integers(100, 500))
        begin = int(rng.integers(0, len(text) - length))
        prompts.append(text[begin : begin + length])

    policy = lk.make_policy("snapkv")
    settings = dict(policy=policy, budget=BUDGET, max_new_tokens=NEW_TOKENS, eos_ids=())
    alone = [lk.generate(model, [p], **settings).tokens[0] for p in prompts]
    together = [
        tokens
        for i in range(0, len(prompts), BATCH)
        for tokens in lk.generate(model, prompts[i : i + BATCH], **settings).tokens
    ]
    margins = []
    for prompt, mine, theirs in zip(prompts, alone, together, strict=True):
        different = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
        if different:
            margins.append(margin(model, prompt, policy, mine[: different[0] + 1]))
    report = {
        "rows": len(prompts),
        "decisions": len(prompts) * NEW_TOKENS,
        "rows_that_differ": len(margins),
        "largest_margin_at_a_first_difference": max(margins, default=None),
        "seed": options.seed,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
