"""LongProc's scores (princeton-pli/LongProc), as lm-evaluation-harness 0.4.13 computes them.

Each takes the prediction, the reference output and the example's metadata, and returns the
benchmark's measures, its headline number first: the accuracy, for tables the F1 of rows. The
others are how far the answer is right from its beginning, and whether it could be parsed.
"""

import csv
import re
import string
from collections.abc import Mapping
from typing import Any

from lookahead_jax.eval.scorers.limited_run import run_cpp

Measures = dict[str, float]


def _measures(accuracy: float, partial: float, extracted: float = 1.0) -> Measures:
    return {"accuracy": accuracy, "partial_accuracy": partial, "extraction_rate": extracted}


_OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else None,
}
# A model may write any number of digits. More than 300 are not read as a number: int() refuses 4301
# digits, and the quotient of integers must fit a float.
_N = r"(?<!\d)\d{1,300}(?!\d)"
_STEP = re.compile(rf"\s*(?P<a>{_N})\s*(?P<op>[-*/])\s*(?P<b>{_N})\s*=\s*(?P<c>-?{_N})\s*")
_SUM = re.compile(rf"\s*(?P<a>-?{_N})\s*(?P<op>\+)\s*(?P<b>-?{_N})\s*=\s*(?P<c>-?{_N})\s*")


def between_tags(text: str, tag: str) -> str | None:
    """The text between <tag> and </tag>."""
    start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
    return None if start < 0 or end < 0 else text[start + len(tag) + 2 : end].strip()


def path_traversal(prediction: str, reference: str, metadata: Mapping[str, Any]) -> Measures:
    """The route is the reference, line for line.

    Partly: its lines up to the first that is wrong, which still counts, as published (the harness
    counts one more of a route that merely ends early).
    """
    route = between_tags(prediction, "Route")
    if route is None:
        return _measures(0.0, 0.0, 0.0)
    right = reference.strip().split("\n")
    given = route.split("\n")
    if given == right:
        return _measures(1.0, 1.0)
    both = list(zip(right, given, strict=False))
    first = next((i for i, (ours, theirs) in enumerate(both) if ours != theirs), len(both) - 1)
    return _measures(0.0, (first + 1) / len(right))


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


def tom_tracking(prediction: str, reference: str, metadata: Mapping[str, Any]) -> Measures:
    """All lines of beliefs agree, small words aside; partly: those before one that does not."""
    given, right = _beliefs(prediction), _beliefs(reference)
    if given == right:
        return _measures(1.0, 1.0)
    both = list(zip(given, right, strict=False))
    first = next((i for i, (theirs, ours) in enumerate(both) if theirs != ours), len(both))
    return _measures(0.0, first / len(right) if right else 0.0)


def _counts_down(solution: str, numbers: list[int], target: int) -> bool:
    """Three lines `a op b = c` use the numbers up and end at the target.

    The original evaluates the left side as Python; here it is read as two integers and one
    operator (a sum may have signs), which is all that its own check goes on to accept.
    """
    lines = solution.split("\n")
    if len(lines) != 3:
        return False
    for line in lines:
        step = _SUM.fullmatch(line) or _STEP.fullmatch(line)
        if step is None:
            return False
        a, b, c = int(step["a"]), int(step["b"]), int(step["c"])
        if _OPERATORS[step["op"]](a, b) != c:
            return False
        for used in (a, b):
            if used not in numbers:
                return False
            numbers.remove(used)
        numbers.append(c)
    return numbers[0] == target


def _same_search(given: str, right: str) -> float:
    """The share of the search before its first wrong action.

    The published count is the index of the last line that was looked at, so that a flawless search
    of n lines has (n - 1) / n of them; where it would be negative we say 0.
    """
    (first, *lines), (opening, *actions) = given.strip().split("\n"), right.strip().split("\n")
    if first != opening or not actions:
        return 0.0
    index = -1
    for line, action in zip(lines, actions, strict=False):
        index += 1
        if line == action:
            continue
        tries = "Pick two numbers" not in action and "|- Try" in action
        same = line.split("=")[0] == action.split("=")[0]
        dropped = "drop this branch"
        if not tries or not same or (dropped in line) != (dropped in action):
            break
    return max(index, 0) / len(actions)


def countdown(prediction: str, reference: str, metadata: Mapping[str, Any]) -> Measures:
    """The solution uses the numbers up and ends at the target; partly: the search follows ours."""
    solution = between_tags(prediction, "Solution")
    if solution is not None and _counts_down(solution, list(metadata["nums"]), metadata["target"]):
        return _measures(1.0, 1.0)
    extracted, head = float(solution is not None), "# Search Procedure"
    if head not in prediction:
        return _measures(0.0, 0.0, extracted)
    right = reference.split(head)[-1].split("Now we have found the target")[0]
    return _measures(0.0, _same_search(prediction.split(head)[-1], right), extracted)


def _stays(plan: str) -> list[tuple[str, int]]:
    """(city, days) of a plan in prose."""
    ends, flights, total = [], [], None
    for line in plan.split("\n"):
        if days := re.findall(rf"European cities for ({_N}) days", line):
            total = int(days[0])
        if span := re.findall(rf"{_N}-{_N}", line):
            ends.append(int(span[0].split("-")[1]))
            if ends[-1] == total:
                break
        if flight := re.findall(rf".*Day ({_N}).*from (\w+) to (\w+)", line):
            flights.append(flight[0])
    if not ends or not flights:
        return []
    cities = [flights[0][1], *(to for _, _, to in flights)]
    days = [1, *(int(day) for day, _, _ in flights), ends[-1]]
    return [(city, days[i + 1] - days[i] + 1) for i, city in enumerate(cities)]


def _plain(line: str) -> str:
    """A line without case, punctuation, articles and surplus space."""
    line = "".join(c for c in line.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", line).split())


def _same_procedure(given: str, right: str) -> float:
    """The share of the procedure before its first line that the answer does not contain."""
    head, asked = "<Solving Procedure>", "Output the plan in the required format:"
    texts = []
    for text in (given, right):
        text = text.replace(asked, "")
        texts.append(head + text.split(head)[1] if head in text else text)
    lines, steps = ([line for line in t.strip().split("\n") if line.strip()] for t in texts)
    index = 0
    for i, (line, step) in enumerate(zip(lines, steps, strict=False)):
        index = i
        if _plain(step) not in _plain(line):
            break
    return index / len(steps) if steps else 0.0


def travel_planning(prediction: str, reference: str, metadata: Mapping[str, Any]) -> Measures:
    """The plan stays in the right cities, in order, for the right number of days.

    Partly: the procedure that leads to it (of n flawless lines (n - 1) / n count, as published).
    """
    plan = between_tags(prediction, "Plan")
    cities = [city for city in metadata["ground_truth_cities"].split("**") if city]
    days = [int(day) for day in metadata["ground_truth_durations"].split("**") if day]
    right = list(zip(cities, days, strict=False))
    if plan is not None and _stays(plan)[: len(right)] == right:
        return _measures(1.0, 1.0)
    return _measures(0.0, _same_procedure(prediction, reference), float(plan is not None))


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


def html_to_tsv(prediction: str, reference: str, metadata: Mapping[str, Any]) -> Measures:
    """F1 of the table's rows, each cell without case, punctuation, articles and space."""
    fenced = re.search(r"```tsv([\s\S]*)```", prediction)
    if fenced:
        prediction = fenced.group(1)
    elif "```tsv" in prediction:
        prediction = prediction.split("```tsv")[1]
    ours, theirs = _table(reference), _table(prediction)
    if ours is None or theirs is None or ours[0] != theirs[0] or not ours[1] or not theirs[1]:
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0, "extraction_rate": 0.0}
    right, given = ours[1], theirs[1]
    precision = sum(row in set(right) for row in given) / len(given)
    recall = sum(row in set(given) for row in right) / len(right)
    f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    return {"f1": f1, "precision": precision, "recall": recall, "extraction_rate": 1.0}


def pseudo_to_code(prediction: str, reference: str, metadata: Mapping[str, Any]) -> Measures:
    """The C++ program in the answer passes the first ten test cases; there is no partly.

    Runs the model's program, which --allow-exec permits.
    """
    found = re.search(r"```cpp([\s\S]*)```", prediction.replace("```c++", "```cpp"))
    if found is None:
        return _measures(0.0, 0.0, 0.0)
    cases = [
        ("\n".join(given) + "\n", "\n".join(expected) + "\n")
        for given, expected in metadata["testcases"][:10]
    ]
    passed = float(run_cpp(found.group(1), cases))
    return _measures(passed, passed)
