"""InfiniteBench's 12 tasks, from infinitebench/<task>.jsonl: id, context, input, answer, options.

Prompts are the published ones for GPT-4 (OpenBMB/InfiniteBench, src/prompt.py), answer lengths and
scores the published ones too.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lookahead_jax.eval.scorers import infinitebench as scores
from lookahead_jax.eval.tasks.base import Example, Source, Task, field, rows_of
from lookahead_jax.eval.tasks.longbench import fill


class InfiniteBenchForm(NamedTuple):
    """The prompt of a task, and the length and score of its answers."""

    prompt: str
    answer: int  # tokens
    score: Callable[..., float]


_HIDDEN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it{}. I will quiz you "
    "about the important information there.\n\n{{context}}\n\n{{input}}"
)
_OPTIONS = "\nA. {a}\nB. {b}\nC. {c}\nD. {d}"

FORMS: dict[str, InfiniteBenchForm] = {
    "passkey": InfiniteBenchForm(_HIDDEN.format(" and memorize them"), 6, scores.first_integer),
    "number_string": InfiniteBenchForm(_HIDDEN.format(""), 12, scores.first_integer),
    "kv_retrieval": InfiniteBenchForm(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        "{context}\n\n{input}",
        50,
        scores.word,
    ),
    "longbook_sum_eng": InfiniteBenchForm(
        "Summarize the following book.\n\n{context}", 1200, scores.summary
    ),
    "longbook_choice_eng": InfiniteBenchForm(
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n\nOnly one of "
        "the following options is correct, tell me the answer using one single letter (A, B, C, or "
        f"D). Don't say anything else.{_OPTIONS}",
        40,
        scores.choice,
    ),
    "longbook_qa_eng": InfiniteBenchForm(
        "Read the book below and answer a question.\n\n{context}\n\nQuestion: {input}\n\n"
        "Be very concise.",
        40,
        scores.english_f1,
    ),
    "longbook_qa_chn": InfiniteBenchForm(
        "请根据以下书籍回答我的问题。\n\n{context}\n\n问题：{input}\n请尽量简短地回答。",
        40,
        scores.chinese_f1,
    ),
    "longdialogue_qa_eng": InfiniteBenchForm(
        "Below is a dialogue script where one random occurrence of a character name is replaced "
        'with "$$MASK$$", and you should try to guess who that character is.\n\nThe dialogue:\n\n'
        "---\n\n{context}\n\n---\n\nEnd of dialogue.\n\nWhich character is most likely "
        '"$$MASK$$"? Just say the name used by the scriptwriter (before the colon marks) of one '
        "single character and nothing else.",
        40,
        scores.names_one,
    ),
    "math_find": InfiniteBenchForm("{prefix}\n\n{context}\n\n{input}", 3, scores.first_number),
    "math_calc": InfiniteBenchForm(
        "Compute the intermediate values in the following long expression.\n\n{context}",
        30000,
        scores.longest_run,
    ),
    "code_run": InfiniteBenchForm(
        "Following is a set of Python functions. There is a function called named {func}.\n\n"
        "{context}\n\nPlease give me the exact number of the return value of {call}. Be concise. "
        "Your response must end with the final returned value.",
        5,
        scores.last_integer,
    ),
    "code_debug": InfiniteBenchForm(
        "There is ONLY ONE function in the large project that is deliberately made to include an "
        "obvious error. Please find the function that contains the most obvious errors. I will "
        "give you four options to narrow your scope. You can inspect the options and think. "
        "Eventually, tell me the answer using one single letter (A, B, C, or D).\n\n{context}\n\n"
        f"Which funtion has deliberate error?{_OPTIONS}\n\nYou should first find the functions in "
        "the options. Repeat their content, inspect through code, and at last give me your answer "
        "for the function that has the deliberate and obvious error in A, B, C, or D.",
        5,
        scores.buggy_function,
    ),
}
"""Task -> its form. ("funtion" is how it is published.)"""
_OPTIONED = ("longbook_choice_eng", "code_debug")


def _fields(name: str, row: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The fields of the prompt, the context excepted."""
    asked = field(row, "input", path)
    fields = {"input": asked}
    if name in _OPTIONED:
        fields |= dict(zip("abcd", field(row, "options", path), strict=False))
    if name == "code_run":
        call = re.search(r"(func_[0-9]+)\(-?[0-9]+\)", asked)
        fields["func"], fields["call"] = call.group(1, 0) if call else ("the function", asked)
    if name == "math_find":
        target = re.findall(r"The .+ of", asked)
        fields["prefix"] = (
            f"What is {target[0].lower()[:-3]} in the following list?" if target else asked
        )
    return fields


def _answers(row: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    answer = field(row, "answer", path)
    return (
        tuple(map(str, answer))
        if isinstance(answer, Sequence) and not isinstance(answer, str)
        else (str(answer),)
    )


def _make(name: str, source: Source) -> list[Example]:
    form, path = FORMS[name], source.file(f"infinitebench/{name}.jsonl")
    head, tail = form.prompt.split("{context}")
    found = []
    for i, row in enumerate(rows_of(path, source.count)):
        fields = _fields(name, row, path)
        found.append(
            Example(
                id=str(row.get("id", i)),
                context=fill(head, **fields) + field(row, "context", path),
                question=fill(tail, **fields),
                answers=_answers(row, path),
                max_new_tokens=form.answer,
                cut="joined",
                extra={"options": row["options"]} if name in _OPTIONED else {},
            )
        )
    return found


def score_answer(name: str, prediction: str, example: Example) -> float:
    """InfiniteBench's score of one prediction, in [0, 1]."""
    measure = FORMS[name].score
    if name in _OPTIONED:
        return measure(prediction, example.answers, example.extra["options"])
    return measure(prediction, example.answers)


def tasks() -> list[Task]:
    """infinitebench/<task>."""
    graded = ("longbook_sum_eng", "longbook_qa_eng", "longbook_qa_chn", "math_calc")
    return [
        Task(
            name=f"infinitebench/{name}",
            make=functools.partial(_make, name),
            score=functools.partial(score_answer, name),
            binary=name not in graded,
        )
        for name in FORMS
    ]
