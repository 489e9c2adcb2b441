"""LongProc's scores (princeton-pli/LongProc), as lm-evaluation-harness 0.4.13 computes them.

Each takes the prediction, the reference output and the example's metadata. The partial scores of
the benchmark are left out: its headline number is the accuracy, for tables the F1 of rows.
"""

import csv
import re
import string
from collections.abc import Mapping
from typing import Any

from lookahead_jax.eval.scorers.sandbox import run_cpp

_OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else None,
}
_STEP = re.compile(r"\s*(?P<a>\d+)\s*(?P<op>[-*/])\s*(?P<b>\d+)\s*=\s*(?P<c>-?\d+)\s*")
_SUM = re.compile(r"\s*(?P<a>-?\d+)\s*(?P<op>\+)\s*(?P<b>-?\d+)\s*=\s*(?P<c>-?\d+)\s*")


def tagged(text: str, tag: str) -> str | None:
    """What stands between <tag> and </tag>."""
    start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
    return None if start < 0 or end < 0 else text[start + len(tag) + 2 : end].strip()


def path_traversal(prediction: str, reference: str, metadata: Mapping[str, Any]) -> float:
    """The route is the reference, line for line."""
    return float(tagged(prediction, "Route") == reference.strip())


_IDLE = (
    r"\b(a|an|the|on|in|at|step|thinks|think|believes|believe|is|are|of|location|know|knows|belief)"
    r"\b"
)


def _beliefs(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        if line.strip().startswith("-"):
            found.append(line)
    beliefs = []
    for line in "\n".join(found).strip().split("\n"):
        if line.startswith("-"):
            content = line.split("-", 1)[1].strip().lower()
            content = "".join(c for c in content if c not in string.punctuation and c != "’")
            beliefs.append(" ".join(re.sub(_IDLE, " ", content).split()))
    return [belief for belief in beliefs if belief]


def tom_tracking(prediction: str, reference: str, metadata: Mapping[str, Any]) -> float:
    """All lines of beliefs agree, small words aside."""
    return float(_beliefs(prediction) == _beliefs(reference))


def countdown(prediction: str, reference: str, metadata: Mapping[str, Any]) -> float:
    """Three lines `a op b = c` use the numbers up and end at the target.

    The original evaluates the left side as Python; here it is read as two integers and one
    operator (a sum may have signs), which is all that its own check goes on to accept.
    """
    solution, numbers = tagged(prediction, "Solution"), list(metadata["nums"])
    lines = [] if solution is None else solution.split("\n")
    if len(lines) != 3:
        return 0.0
    for line in lines:
        step = _SUM.fullmatch(line) or _STEP.fullmatch(line)
        if step is None:
            return 0.0
        a, b, c = int(step["a"]), int(step["b"]), int(step["c"])
        if _OPERATORS[step["op"]](a, b) != c:
            return 0.0
        for used in (a, b):
            if used not in numbers:
                return 0.0
            numbers.remove(used)
        numbers.append(c)
    return float(numbers[0] == metadata["target"])


def _stays(plan: str) -> list[tuple[str, int]]:
    """(city, days) of a plan in prose."""
    ends, flights, total = [], [], None
    for line in plan.split("\n"):
        if days := re.findall(r"European cities for (\d+) days", line):
            total = int(days[0])
        if span := re.findall(r"\d+-\d+", line):
            ends.append(int(span[0].split("-")[1]))
            if ends[-1] == total:
                break
        if flight := re.findall(r".*Day (\d+).*from (\w+) to (\w+)", line):
            flights.append(flight[0])
    if not ends or not flights:
        return []
    cities = [flights[0][1], *(to for _, _, to in flights)]
    days = [1, *(int(day) for day, _, _ in flights), ends[-1]]
    return [(city, days[i + 1] - days[i] + 1) for i, city in enumerate(cities)]


def travel_planning(prediction: str, reference: str, metadata: Mapping[str, Any]) -> float:
    """The plan stays in the right cities, in order, for the right number of days."""
    plan = tagged(prediction, "Plan")
    cities = [city for city in metadata["ground_truth_cities"].split("**") if city]
    days = [int(day) for day in metadata["ground_truth_durations"].split("**") if day]
    right = list(zip(cities, days, strict=False))
    return float(plan is not None and _stays(plan)[: len(right)] == right)


def _cell(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).replace(" ", "").strip()


def _table(text: str) -> tuple[int, list[tuple[str, ...]]] | None:
    """Columns and rows; a torn last row is dropped, any other misfit becomes a row of N/A."""
    try:
        header, *rows = csv.reader(text.strip().split("\n"), delimiter="\t")
    except (csv.Error, ValueError):
        return None
    if len(set(header)) < len(header):
        return None
    if rows and len(rows[-1]) != len(header):
        rows.pop()
    fitted = [row if len(row) == len(header) else ["N/A"] * len(header) for row in rows]
    return len(header), [tuple("".join(_cell(c).split()) for c in row) for row in fitted]


def html_to_tsv(prediction: str, reference: str, metadata: Mapping[str, Any]) -> float:
    """F1 of the table's rows, each cell without case, punctuation, articles and space."""
    fenced = re.search(r"```tsv([\s\S]*)```", prediction)
    if fenced:
        prediction = fenced.group(1)
    elif "```tsv" in prediction:
        prediction = prediction.split("```tsv")[1]
    ours, theirs = _table(reference), _table(prediction)
    if ours is None or theirs is None or ours[0] != theirs[0] or not ours[1] or not theirs[1]:
        return 0.0
    right, given = ours[1], theirs[1]
    precision = sum(row in set(right) for row in given) / len(given)
    recall = sum(row in set(given) for row in right) / len(right)
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


def pseudo_to_code(prediction: str, reference: str, metadata: Mapping[str, Any]) -> float:
    """The C++ program in the answer passes the first ten test cases.

    Runs the model's program: callers ask for that with --allow-exec.
    """
    found = re.search(r"```cpp([\s\S]*)```", prediction.replace("```c++", "```cpp"))
    if found is None:
        return 0.0
    cases = [
        ("\n".join(given) + "\n", "\n".join(expected) + "\n")
        for given, expected in metadata["testcases"][:10]
    ]
    return float(run_cpp(found.group(1), cases))
