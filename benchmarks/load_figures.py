"""What a load test makes of its exchanges and samples: figures, checks and ratios."""

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from load_client import Outcome
from serving import compare

RESIDENT_CHANGE = 0.02


def figures(outcomes: Sequence[Outcome], *, began: float, seconds: float) -> dict[str, Any]:
    """Throughput within the `seconds` from `began`, and times of all streams with an answer.

    A stream's tokens count when its pieces arrive, evenly.
    """
    end = began + seconds
    answered = [each for each in outcomes if each.end == "answered"]
    tokens = 0.0
    for each in answered:
        times = each.pieces or [each.ended]
        tokens += each.tokens * sum(t <= end for t in times) / len(times)
    streams = [each for each in answered if each.kind == "stream" and each.pieces]
    gaps = [b - a for each in streams for a, b in itertools.pairwise(each.pieces)]
    token_s = [
        (each.pieces[-1] - each.pieces[0]) / (each.tokens - 1)
        for each in streams
        if each.tokens > 1
    ]
    return {
        "answers_per_s": sum(each.ended <= end for each in answered) / seconds,
        "tokens_per_s": tokens / seconds,
        "first_token_s": spread([each.pieces[0] - each.began for each in streams]),
        "gap_s": spread(gaps),
        "token_s": spread(token_s),
        "counts": counts(outcomes),
    }


def counts(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """How exchanges went, by kind."""
    table: dict[str, Counter[str]] = {}
    for each in outcomes:
        table.setdefault(each.kind, Counter())[each.end] += 1
    return {kind: dict(sorted(ends.items())) for kind, ends in sorted(table.items())}


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles and the largest value; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    found = {
        name: ordered[min(len(ordered) - 1, int(s * len(ordered)))] for name, s in shares.items()
    }
    return found | {"most": ordered[-1]}


def resident_change(samples: Sequence[dict]) -> float:
    """Mean resident memory of the last fifth of the samples over that of the second, less one.

    In the first fifth the clients arrive.
    """
    fifth = max(1, len(samples) // 5)
    early, late = (
        statistics.fmean(each["resident_mb"] for each in part)
        for part in (samples[fifth : 2 * fifth], samples[-fifth:])
    )
    return late / early - 1


def checks(
    *,
    before: dict,
    after: dict,
    samples: Sequence[dict],
    problems: int,
    marks: int,
    status: int,
    answers: int,
) -> dict[str, dict]:
    """Each with its figures and whether it holds; `before` and `after` are without clients."""

    def at_most(name: str) -> dict:
        return {"before": before[name], "after": after[name], "ok": after[name] <= before[name]}

    def zero(count: float) -> dict:
        return {"count": count, "ok": count == 0}

    change = resident_change(samples)
    left = after["resident_mb"] / before["resident_mb"] - 1
    return {
        "exchanges without a right answer": zero(problems),
        "answers": {"count": answers, "ok": answers > 0},
        "rows in use afterwards": zero(after["running"]),
        "requests in the queue afterwards": zero(after["waiting"]),
        "places taken afterwards": zero(after["places"]),
        "threads": at_most("threads"),
        "descriptors": at_most("descriptors"),
        "resident memory under load": {"change": change, "ok": abs(change) <= RESIDENT_CHANGE},
        "resident memory without clients": {"change": left, "ok": left <= RESIDENT_CHANGE},
        "errors in the log": zero(marks),
        "exit status": zero(status),
    }


def ratios(mine: Sequence[dict], theirs: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Median and range over turns; above 1, `mine` has more throughput or takes less time.

    What one side has no figure of, because nothing was answered in time, is left out.
    """
    pairs = list(zip(mine, theirs, strict=True))
    found = {}
    for name in ("answers_per_s", "tokens_per_s"):
        if all(a[name] and b[name] for a, b in pairs):
            found[name] = compare([a[name] for a, _ in pairs], [b[name] for _, b in pairs])
    for name in ("first_token_s", "gap_s", "token_s"):
        if all(a[name] and b[name] for a, b in pairs):
            for part in ("p50", "p95", "p99", "most"):
                found[f"{name} {part}"] = compare(
                    [b[name][part] for _, b in pairs], [a[name][part] for a, _ in pairs]
                )
    return found
