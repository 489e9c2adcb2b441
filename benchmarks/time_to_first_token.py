"""The time that eviction adds to the first token, in paired and interleaved runs.

Every repetition reads the same prompt once with each policy, in random order. The report has the
mean difference from the full cache with a 95 % interval over repetitions, and the median ratio.

    python benchmarks/time_to_first_token.py --out benchmarks/results/time_to_first_token.json
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
from lookahead_jax.eval.intervals import of_mean

POLICIES = {
    "full": ("full", {}),
    "lookaheadkv": ("lookaheadkv", {}),
    "snapkv": ("snapkv", {}),
    "h2o": ("h2o", {}),
    "laq": ("laq", {"draft_tokens": 32}),
}


def measure(tokens: int, budget: int, repetitions: int, modules_dir: Path) -> dict:
    """Seconds of every repetition and policy, and statistics of the differences."""
    model = lk.load(lk.EMBEDDED_MODEL)
    modules = lk.load_modules(modules_dir, params=model.params, config=model.config)
    text = (lk.EMBEDDED_MODEL.parent / "example.txt").read_text()
    prompt = jnp.asarray(np.resize(model.tokenizer.encode(text), (1, tokens)), jnp.int32)
    policies = {n: lk.make_policy(name, **kw) for n, (name, kw) in POLICIES.items()}

    def read(name: str) -> None:
        result = lk.read_prompt(
            model.params, prompt, config=model.config, policy=policies[name], budget=budget,
            new_tokens=64, modules=modules,
        )  # fmt: skip
        jax.block_until_ready((result.logits.argmax(-1), result.cache))

    for name in policies:
        read(name)
    rng, seconds = np.random.default_rng(0), {name: [] for name in policies}
    for _ in range(repetitions):
        for name in rng.permutation(list(policies)).tolist():
            began = time.perf_counter()
            read(name)
            seconds[name].append(time.perf_counter() - began)
    return {name: _compare(values, seconds["full"]) for name, values in seconds.items()}


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
    tokens: Annotated[int, Help("prompt tokens")] = 2048
    budget: Annotated[int, Help("prompt entries kept per layer and KV head")] = 128
    repetitions: Annotated[int, Help("readings of the prompt by each policy")] = 40
    modules: Annotated[Path, Help("folder of the lookahead modules")] = lk.EMBEDDED_MODULES
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def main() -> None:
    options = parse(Options, __doc__)
    sizes = (options.tokens, options.budget, options.repetitions)
    report = {
        **ran_on(),
        **settings(options, "modules", "out"),
        "policies": measure(*sizes, options.modules),
    }
    publish(report, options.out)


if __name__ == "__main__":
    main()
