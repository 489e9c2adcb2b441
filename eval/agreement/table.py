"""The rows of an agreement run -> Markdown tables, one for each measure."""

from collections.abc import Mapping, Sequence
from typing import Any

from lookahead_jax.eval.grid.rows import Fields
from lookahead_jax.eval.intervals import of_mean

_ALL = "all prompts"
_MEASURES = {
    "kl": "KL divergence from the full cache, nats per token",
    "same": "Share of the answer's tokens at which the most likely one stays the same",
    "followed": "Share of the answer before the first token at which it does not",
    "f1": "F1 of the words of the answer",
}
ROW: Fields = {
    "id": (str,), "category": (str,), "policy": (str,), "budget": (int,), "prompt_tokens": (int,),
    "modules": (str, type(None)),
} | {name: (float, int, type(None)) for name in _MEASURES}  # fmt: skip
"""The fields of a row."""


def table(
    rows: Sequence[Mapping[str, Any]], policies: Sequence[str], budgets: Sequence[int]
) -> str:
    """Means over prompts, with Student's 95 % interval over all of them, and by category."""
    categories = sorted({row["category"] for row in rows})
    groups = {_ALL: rows}
    if len(categories) > 1:
        groups |= {c or "others": [r for r in rows if r["category"] == c] for c in categories}
    cells = {
        (group, policy, budget): [
            row for row in members if (row["policy"], row["budget"]) == (policy, budget)
        ]
        for group, members in groups.items()
        for policy in policies
        for budget in sorted(budgets)
    }
    heads = [f"{group}, {budget} kept" for group in groups for budget in sorted(budgets)]
    lines = [_prompts(groups)]
    for measure, title in _MEASURES.items():
        if all(row[measure] is None for row in rows):
            continue
        lines += ["", f"{title}:", "", "| policy | " + " | ".join(heads) + " |"]
        lines += ["|---" * (1 + len(heads)) + "|"]
        for policy in policies:
            texts = [
                _text([row[measure] for row in cells[group, policy, budget]], group == _ALL)
                for group in groups
                for budget in sorted(budgets)
            ]
            lines.append(f"| {policy} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _prompts(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How many prompts each group has, and how long they are, with the answers if these count."""
    parts = []
    for group, rows in groups.items():
        tokens = {row["id"]: row["prompt_tokens"] + row.get("answer_tokens", 0) for row in rows}
        parts.append(f"{len(tokens)} {group} ({min(tokens.values())} to {max(tokens.values())})")
    return f"Prompts, and their tokens: {', '.join(parts)}."


def _text(values: Sequence[float], with_interval: bool) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.3f}"
    if not with_interval or len(values) < 2:
        return mean
    low, high = of_mean(values)
    return f"{mean} ({low:.3f} to {high:.3f})"
