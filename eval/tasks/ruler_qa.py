"""RULER's question answering: the documents that answer a question, among others of the set."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lookahead_jax.eval.tasks.base import Example, Source, largest

ANSWER = 32  # tokens
_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


class Question(NamedTuple):
    """A question and the documents that belong to it, by index."""

    text: str
    answers: tuple[str, ...]
    gold: list[int]
    near: list[int]  # others of the same article, the first to be added


def read_squad(content: Mapping[str, Any]) -> tuple[list[Question], list[str]]:
    """Answerable questions of SQuAD 2.0, and all its paragraphs."""
    articles = content["data"]
    every = sorted({p["context"] for article in articles for p in article["paragraphs"]})
    number = {text: i for i, text in enumerate(every)}
    questions = []
    for article in articles:
        whole = [number[p["context"]] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            for asked in paragraph["qas"]:
                if not asked.get("is_impossible", False):
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    near = [i for i in whole if i != own]
                    questions.append(Question(asked["question"], answers, [own], near))
    return questions, every


def read_hotpotqa(content: Sequence[Mapping[str, Any]]) -> tuple[list[Question], list[str]]:
    """The questions of HotpotQA's distractor setting, and all its documents."""

    def documents(row: Mapping[str, Any]) -> list[str]:
        return [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]

    every = sorted({text for row in content for text in documents(row)})
    number = {text: i for i, text in enumerate(every)}
    questions = [
        Question(row["question"], (row["answer"],), [number[t] for t in documents(row)], [])
        for row in content
    ]
    return questions, every


def _documents(
    rng: random.Random, question: Question, every: Sequence[str], count: int
) -> list[str]:
    """`count` documents in random order, the question's own among them."""
    chosen = list(question.gold)
    more = count - len(chosen)
    if more > len(question.near):
        taken = set(question.gold) | set(question.near)
        rest = [i for i in range(len(every)) if i not in taken]
        chosen += question.near
        chosen += rng.sample(rest, min(len(rest), more - len(question.near)))
    elif more > 0:
        chosen += rng.sample(question.near, more)
    rng.shuffle(chosen)
    return [every[i] for i in chosen]


def qa(source: Source, content: Any, file: str) -> list[Example]:
    """As many documents as fit, per question; questions whose own do not fit are left out."""
    questions, every = (read_squad if file == "squad" else read_hotpotqa)(content)
    found: list[Example] = []
    units = 0
    for index, question in enumerate(questions):
        if len(found) == source.count:
            break

        def made(count: int, index: int = index, question: Question = question) -> Example:
            rng = random.Random(f"{source.seed}/{source.length}/{index}")
            texts = _documents(rng, question, every, count)
            context = "\n\n".join(f"Document {i}:\n{t}" for i, t in enumerate(texts, 1))
            return Example(
                id=str(index),
                context=f"{_ASK}\n\nThe following are given documents.\n\n{context}",
                question=f"\n\n{_ASK}\n\nQuestion: {question.text}",
                prefix=" Answer:",
                answers=question.answers,
                max_new_tokens=ANSWER,
            )

        def fits(count: int) -> bool:
            if count > len(every):
                return False
            example = made(count)
            whole = f"{example.context}{example.question}{example.prefix}"
            return len(source.tokenizer.encode(whole)) + ANSWER <= source.length

        least = len(question.gold)
        if not units:
            units = largest(fits, least)
        size = max(units, least)
        while size >= least and not fits(size):
            size -= max(1, size // 20)
        if size >= least:
            found.append(made(size))
    if not found:
        raise ValueError(f"no question of {file} fits into {source.length} tokens")
    return found
