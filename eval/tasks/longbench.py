"""LongBench (16 English tasks, and -E) and LongBench v2, from local files in their formats.

    longbench/<task>.jsonl     input, context, answers, length, all_classes, _id
    longbench/<task>_e.jsonl   the same, lengths evenly spread: task longbench_e/<task>
    longbench_v2/data.json     question, choice_A ... choice_D, answer, context, difficulty, length

Prompts, lengths of answers and exceptions from the chat template are those of THUDM/LongBench
(config/dataset2prompt.json, dataset2maxlen.json, pred.py; for v2 prompts/0shot.txt).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from lookahead_jax.eval.scorers import text
from lookahead_jax.eval.scorers.rouge import rouge_l
from lookahead_jax.eval.tasks.base import Example, Source, Task, field, rows_of


class LongBenchForm(NamedTuple):
    """The prompt of a task, and the length and score of its answers."""

    prompt: str
    answer: int  # tokens
    score: str
    chat: bool = True  # chat models do better without their template on few-shot and code tasks


_STORY = (
    "nswer the question{} asconcisely as you can, using a single phrase if possible. "
    "Do not provide any explanation."
)
_PAPER = (
    "nswer the question{} as concisely as you can, using a single phrase or sentence if possible. "
    "If the question cannot be answered based on the information in the article, write "
    '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
    "Do not provide any explanation."
)
_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words."
)
_MULTI = LongBenchForm(
    f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\n"
    "Question: {input}\nAnswer:",
    32,
    "f1",
)

FORMS: dict[str, LongBenchForm] = {
    "narrativeqa": LongBenchForm(
        "You are given a story, which can be either a novel or a movie script, and a question. "
        f"A{_STORY.format('')}\n\nStory: {{context}}\n\n"
        f"Now, a{_STORY.format(' based on the story')}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        "f1",
    ),
    "qasper": LongBenchForm(
        f"You are given a scientific article and a question. A{_PAPER.format('')}\n\n"
        f"Article: {{context}}\n\n A{_PAPER.format(' based on the above article')}\n\n"
        "Question: {input}\n\nAnswer:",
        128,
        "f1",
    ),
    "multifieldqa_en": LongBenchForm(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: {input}\nAnswer:",
        64,
        "f1",
    ),
    "hotpotqa": _MULTI,
    "2wikimqa": _MULTI,
    "musique": _MULTI,
    "gov_report": LongBenchForm(
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        "rouge",
    ),
    "qmsum": LongBenchForm(
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the "
        "query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:",
        512,
        "rouge",
    ),
    "multi_news": LongBenchForm(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        "rouge",
    ),
    "trec": LongBenchForm(
        "Please determine the type of the question below. Here are some examples of questions."
        "\n\n{context}\n{input}",
        64,
        "class",
        chat=False,
    ),
    "triviaqa": LongBenchForm(
        "Answer the question based on the given passage. Only give me the answer and do not output "
        "any other words. The following are some examples.\n\n{context}\n\n{input}",
        32,
        "f1",
        chat=False,
    ),
    "samsum": LongBenchForm(
        "Summarize the dialogue into a few short sentences. The following are some examples."
        "\n\n{context}\n\n{input}",
        128,
        "rouge",
        chat=False,
    ),
    "passage_count": LongBenchForm(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
        "Please carefully read these paragraphs and determine how many unique paragraphs there are "
        "after removing duplicates. In other words, how many non-repeating paragraphs are there in "
        "total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing "
        "duplicates. The output format should only contain the number, such as 1, 2, 3, and so on."
        "\n\nThe final answer is: ",
        32,
        "count",
    ),
    "passage_retrieval_en": LongBenchForm(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
        "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}"
        "\n\nPlease enter the number of the paragraph that the abstract is from. The answer format "
        'must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "retrieval",
    ),
    "lcc": LongBenchForm(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64,
        "code",
        chat=False,
    ),
    "repobench-p": LongBenchForm(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64,
        "code",
        chat=False,
    ),
}
"""Task -> its form. ("asconcisely" is how it is published.)"""

E_TASKS = tuple(name for name in FORMS if name not in ("narrativeqa", "musique", "qmsum"))
_FIRST_LINE = ("trec", "triviaqa", "samsum")  # their answers end with the line
_SCORES: dict[str, text.Score] = {
    "f1": text.qa_f1,
    "rouge": rouge_l,
    "count": text.count,
    "retrieval": text.retrieval,
    "code": text.code_similarity,
}


def fill(template: str, **fields: str) -> str:
    """Replaces {name}; braces in the fields stay as they are."""
    parts = [template]
    for name, value in fields.items():
        cut = [part.split(f"{{{name}}}") if i % 2 == 0 else [part] for i, part in enumerate(parts)]
        parts = []
        for pieces in cut:
            for i, piece in enumerate(pieces):
                parts += [value, piece] if i else [piece]
    return "".join(parts)


def score_answer(name: str, prediction: str, example: Example) -> float:
    """LongBench's score of one prediction, in [0, 1]."""
    form = FORMS[name]
    if name in _FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    measure = _SCORES.get(form.score)
    if measure is None:
        measure = functools.partial(text.classification, classes=example.extra["all_classes"])
    return text.best(measure, prediction, example.answers)


def _make(name: str, file: str, source: Source) -> list[Example]:
    form, path = FORMS[name], source.file(file)
    head, tail = form.prompt.split("{context}")
    return [
        Example(
            id=str(row.get("_id", i)),
            context=head + field(row, "context", path),
            question=fill(tail, input=field(row, "input", path)),
            answers=tuple(field(row, "answers", path)),
            max_new_tokens=form.answer,
            chat=form.chat,
            # As published: on samsum models go on with another dialogue.
            stop=("\n",) if name == "samsum" else (),
            extra={key: row[key] for key in ("all_classes", "length") if key in row},
        )
        for i, row in enumerate(rows_of(path, source.count))
    ]


_V2_CHOICES = "".join(f"\n({c}) {{choice_{c}}}" for c in "ABCD")
_V2_QUESTION = (
    "\n</text>\n\nWhat is the correct answer to this question: {question}\nChoices:"
    + _V2_CHOICES
    + '\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
)


def _make_v2(source: Source) -> list[Example]:
    path = source.file("longbench_v2/data.json", "longbench_v2/data.jsonl")
    names = ("question", "choice_A", "choice_B", "choice_C", "choice_D")
    head = "Please read the following text and answer the question below.\n\n<text>\n"
    return [
        Example(
            id=str(row.get("_id", i)),
            context=head + field(row, "context", path).strip(),
            question=fill(_V2_QUESTION, **{n: field(row, n, path).strip() for n in names}),
            answers=(field(row, "answer", path),),
            max_new_tokens=128,
            cut="joined",
            extra={k: row[k] for k in ("difficulty", "length", "domain") if k in row},
        )
        for i, row in enumerate(rows_of(path, source.count))
    ]


def _letter(prediction: str, example: Example) -> float:
    return text.best(text.letter, prediction, example.answers)


def tasks() -> list[Task]:
    """longbench/<task>, longbench_e/<task> and longbench_v2."""
    found = []
    for family, names, ending in (("longbench", FORMS, ""), ("longbench_e", E_TASKS, "_e")):
        for name in names:
            make: Callable[[Source], list[Example]] = functools.partial(
                _make, name, f"longbench/{name}{ending}.jsonl"
            )
            rate: Callable[[str, Example], float] = functools.partial(score_answer, name)
            found.append(Task(name=f"{family}/{name}", make=make, score=rate))
    found.append(Task(name="longbench_v2", make=_make_v2, score=_letter, binary=True))
    return found
