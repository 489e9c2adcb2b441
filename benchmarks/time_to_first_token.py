"""The time that eviction adds to the first token, in paired and interleaved runs.

Every repetition reads the same prompt once with each policy, in random order. The report has the
mean difference from the full cache with a 95 % interval over repetitions, and the median ratio.

    python benchmarks/time_to_first_token.py --out benchmarks/results/time_to_first_token.json
    python benchmarks/time_to_first_token.py --model smollm2 --repetitions 8

LookaheadKV has the modules that ship for the model, with the settings chosen for them.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from common import Help, parse, publish, ran_on, settings

import lookahead_jax as lk
from lookahead_jax.eval.grid.config import EMBEDDED, model_folder
from lookahead_jax.eval.intervals import of_mean
from lookahead_jax.modules.shipped import shipped_modules

POLICIES = {
    "full": ("full", {}),
    "snapkv": ("snapkv", {}),
    "h2o": ("h2o", {}),
    "laq": ("laq", {"draft_tokens": 32}),
}


def measure(name: str, tokens: int, budget: int, repetitions: int) -> dict:
    """Seconds of every repetition and policy, and statistics of the differences."""
    shipped = shipped_modules(None if name == EMBEDDED else name)
    if shipped is None:
        raise SystemExit(f"--model {name}: no lookahead modules ship for it")
    model = lk.load(model_folder(name))
    modules = lk.load_modules(shipped.folder, params=model.params, config=model.config)
    text = (lk.EMBEDDED_MODEL.parent / "example.txt").read_text()
    prompt = jnp.asarray(np.resize(model.tokenizer.encode(text), (1, tokens)), jnp.int32)
    chosen = POLICIES | {"lookaheadkv": ("lookaheadkv", shipped.settings)}
    policies = {n: lk.make_policy(name, **kw) for n, (name, kw) in chosen.items()}

    def read(policy: str) -> None:
        result = lk.read_prompt(
            model.params, prompt, config=model.config, policy=policies[policy], budget=budget,
            new_tokens=64, modules=modules,
        )  # fmt: skip
        jax.block_until_ready((result.logits.argmax(-1), result.cache))

    for policy in policies:
        read(policy)
    rng, seconds = np.random.default_rng(0), {policy: [] for policy in policies}
    for _ in range(repetitions):
        for policy in rng.permutation(list(policies)).tolist():
            began = time.perf_counter()
            read(policy)
            seconds[policy].append(time.perf_counter() - began)
    return {policy: _compare(values, seconds["full"]) for policy, values in seconds.items()}


def _compare(values: list[float], full: list[float]) -> dict:
    added = np.array(values) - np.array(full)
    return {
        "median_s": float(np.median(values)),
        "added_ms": 1e3 * float(added.mean()),
        "added_ms_interval": [1e3 * bound for bound in of_mean(added)],
        "median_ratio": float(np.median(np.array(values) / np.array(full))),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    model: Annotated[str, Help("embedded, or another model that modules ship for")] = EMBEDDED
    tokens: Annotated[int, Help("prompt tokens")] = 2048
    budget: Annotated[int, Help("prompt entries kept per layer and KV head")] = 128
    repetitions: Annotated[int, Help("readings of the prompt by each policy")] = 40
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def main() -> None:
    options = parse(Options, __doc__)
    sizes = (options.tokens, options.budget, options.repetitions)
    report = {
        **ran_on(),
        **settings(options, "out"),
        "policies": measure(options.model, *sizes),
    }
    publish(report, options.out)


if __name__ == "__main__":
    main()
