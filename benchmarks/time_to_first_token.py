"""The time that eviction adds to the first token, in paired and interleaved runs.

Every repetition reads the same prompt once with each policy, in random order. The report has the
mean difference from the full cache with a 95 % interval over repetitions, and the median ratio.

    python benchmarks/time_to_first_token.py --out benchmarks/results/time_to_first_token.json
    python benchmarks/time_to_first_token.py --model smollm2 --repetitions 8
    python benchmarks/time_to_first_token.py --model smollm2 --policies full kvzip+ kvzap:file=F

`lookaheadkv` without settings has those chosen for the modules that ship for the model.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from common import Help, parse, publish, ran_on, settings

import lookahead_jax as lk
from lookahead_jax.eval.grid.config import EMBEDDED, model_folder, policy_of
from lookahead_jax.eval.intervals import of_mean
from lookahead_jax.modules.shipped import shipped_modules
from lookahead_jax.prompts.kvzip_replay import repeat_template

FULL = "full"


def measure(name: str, specs: Sequence[str], tokens: int, budget: int, repetitions: int) -> dict:
    """Seconds of every repetition and policy, and statistics of the differences."""
    shipped = shipped_modules(None if name == EMBEDDED else name)
    if shipped is None:
        raise SystemExit(f"--model {name}: no lookahead modules ship for it")
    model = lk.load(model_folder(name))
    modules = lk.load_modules(shipped.folder, params=model.params, config=model.config)
    text = (lk.EMBEDDED_MODEL.parent / "example.txt").read_text()
    prompt = jnp.asarray(np.resize(model.tokenizer.encode(text), (1, tokens)), jnp.int32)
    policies = {spec: policy_of(spec) for spec in specs}
    if "lookaheadkv" in policies:
        policies["lookaheadkv"] = lk.make_policy("lookaheadkv", **shipped.settings)

    def read(spec: str) -> None:
        result = lk.read_prompt(
            model.params, prompt, config=model.config, policy=policies[spec], budget=budget,
            new_tokens=64, modules=modules,
            repeat_template=repeat_template(policies[spec], model.tokenizer),
        )  # fmt: skip
        jax.block_until_ready((result.logits.argmax(-1), result.cache))

    for spec in policies:
        read(spec)
    rng, seconds = np.random.default_rng(0), {spec: [] for spec in policies}
    for _ in range(repetitions):
        for spec in rng.permutation(list(policies)).tolist():
            began = time.perf_counter()
            read(spec)
            seconds[spec].append(time.perf_counter() - began)
    return {spec: _compare(values, seconds[FULL]) for spec, values in seconds.items()}


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
    policies: Annotated[tuple[str, ...], Help("policies, with settings as in a grid")] = (
        FULL, "snapkv", "h2o", "laq:draft_tokens=32", "lookaheadkv",
    )  # fmt: skip
    tokens: Annotated[int, Help("prompt tokens")] = 2048
    budget: Annotated[int, Help("prompt entries kept per layer and KV head")] = 128
    repetitions: Annotated[int, Help("readings of the prompt by each policy")] = 40
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def main() -> None:
    options = parse(Options, __doc__)
    if FULL not in options.policies:
        raise SystemExit(f"--policies must name {FULL}: the others are compared with it")
    sizes = (options.tokens, options.budget, options.repetitions)
    report = {
        **ran_on(),
        **settings(options, "out", "policies"),
        "policies": measure(options.model, options.policies, *sizes),
    }
    publish(report, options.out)


if __name__ == "__main__":
    main()
