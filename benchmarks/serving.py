"""Tokens per second of `lookahead serve` with 8 concurrent requests, and with one at a time.

There are two servers, each in its own process: one with 8 rows and one with a single row. Every
repetition sends the same requests one at a time to both, and 8 at a time to the first, in random
order. All prompts differ, no prompt is stored, and all continuations have the same length.

    python benchmarks/serving.py --out benchmarks/results/serving.json
"""

import dataclasses
import json
import random
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from common import Help, parse, publish, ran_on, settings
from servers import Launch, lookahead, serving, usage

import lookahead_jax as lk

CONCURRENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    prompt: Annotated[int, Help("tokens of every prompt")] = 512
    new: Annotated[int, Help("tokens of every continuation")] = 128
    budget: Annotated[int, Help("prompt entries kept per layer and KV head")] = 128
    requests: Annotated[int, Help("requests of a repetition")] = 16
    repetitions: Annotated[int, Help("measurements of each case")] = 5
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def rows_of(rows: int, prompt: int, new: int, budget: int) -> Launch:
    """A server with that many rows."""
    options = ["--rows", rows, "--max-tokens", new, "--max-prompt-tokens", prompt]
    options += ["--budget", budget, "--prompt-store-mb", 0]
    return lookahead(*map(str, options), "--no-request-log")


def ask(url: str, prompt: list[int], new: int) -> int:
    """Sends one request; returns the number of generated tokens."""
    body = {"model": "embedded", "prompt": prompt, "max_tokens": new}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["usage"]["completion_tokens"]


def tokens_per_s(url: str, prompts: list[list[int]], new: int, concurrent: int) -> float:
    """Generated tokens per second of wall time; the time of prompts is included."""
    with ThreadPoolExecutor(concurrent) as pool:
        began = time.perf_counter()
        count = sum(pool.map(lambda prompt: ask(url, prompt, new), prompts))
        return count / (time.perf_counter() - began)


def measure(options: Options) -> dict:
    """The rates of all repetitions, their ratios, and the memory of the server with 8 rows."""
    tokenizer = lk.load(lk.EMBEDDED_MODEL).tokenizer
    ids = tokenizer.encode((lk.EMBEDDED_MODEL.parent / "example.txt").read_text())
    dice = random.Random(0)
    begins = [dice.randrange(len(ids) - options.prompt) for _ in range(options.requests)]
    prompts = [ids[begin : begin + options.prompt] for begin in begins]
    sizes = (options.prompt, options.new, options.budget)
    launches = rows_of(CONCURRENT, *sizes), rows_of(1, *sizes)
    with serving(launches[0]) as many, serving(launches[1]) as single:
        cases = {
            "concurrent": (many.url, CONCURRENT),
            "one_at_a_time": (many.url, 1),
            "one_at_a_time_one_row": (single.url, 1),
        }
        for url, concurrent in cases.values():
            tokens_per_s(url, prompts, options.new, concurrent)
        before = usage(many.process.pid).resident_mb
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(options.repetitions):
            for name in dice.sample(list(cases), len(cases)):
                url, concurrent = cases[name]
                rates[name].append(tokens_per_s(url, prompts, options.new, concurrent))
        after = usage(many.process.pid).resident_mb
    return {
        "tokens_per_s": rates,
        "ratio": compare(rates["concurrent"], rates["one_at_a_time"]),
        "ratio_to_one_row": compare(rates["concurrent"], rates["one_at_a_time_one_row"]),
        "resident_mb": {"before": before, "after": after},
    }


def compare(rates: list[float], base: list[float]) -> dict[str, float]:
    """Median and range of the ratios of paired repetitions."""
    ratios = [a / b for a, b in zip(rates, base, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    options = parse(Options, __doc__)
    report = {
        **ran_on(),
        **settings(options, "out"),
        **measure(options),
    }
    publish(report, options.out)


if __name__ == "__main__":
    main()
