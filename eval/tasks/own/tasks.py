"""The embedded model's own tasks, and needles: one fact at a chosen depth of a document.

`own/<task>` are the families of prompts.py among comment lines, token for token what the embedded
model was trained to read. `own/needle` is one of its rows in held-out code. `needle` is text, in
RULER's words, among essays (or `needle_like`, among held-out code); its depths are the published
grid's. Examples go through the depths in turn.
"""

import functools
import random

import numpy as np

from lookahead_jax.eval.scorers.text import substring_all
from lookahead_jax.eval.tasks.base import Example, Source, Task, largest
from lookahead_jax.eval.tasks.own.code import code_stream
from lookahead_jax.eval.tasks.own.families import FAMILIES, Pool
from lookahead_jax.eval.tasks.own.prompts import OWN_TASKS, make_example, text_lines
from lookahead_jax.eval.tasks.own.words import Words
from lookahead_jax.eval.tasks.ruler import NEEDLE
from lookahead_jax.eval.tasks.ruler_material import insert_sentences, published, substitute

ROOM = 16  # tokens that the longest answer of a family may have
DEPTHS = tuple(range(0, 101, 10))  # percent


def _split(prompt: list[int], words: Words) -> int:
    """Where the question begins: the line break before the last >>>."""
    return len(prompt) - 1 - prompt[::-1].index(words.symbols[">>>"]) - 1


def _example(
    index: int, prompt: list[int], answer: list[int], words: Words, source: Source, **extra
):
    at = _split(prompt, words)
    right = source.tokenizer.decode(answer)
    return Example(
        id=str(index), context=tuple(prompt[:at]), question=tuple(prompt[at:]),
        answers=(right,), max_new_tokens=ROOM, chat=False, extra=extra,
    )  # fmt: skip


def _family(name: str, source: Source) -> list[Example]:
    words = Words.of(source.tokenizer.backend)
    found = []
    for i in range(source.count):
        made = make_example(name, words, seed=(source.seed, i), length=source.length)
        found.append(_example(i, made.prompt.tolist(), made.answer.tolist(), words, source))
    return found


def _own_needle(source: Source) -> list[Example]:
    words = Words.of(source.tokenizer.backend)
    lines = text_lines(code_stream(source.tokenizer.backend, "test", words.bos), words)
    found = []
    for i in range(source.count):
        depth = DEPTHS[i % len(DEPTHS)]
        rng = np.random.default_rng((source.seed, source.length, i))
        facts = FAMILIES["lookup"](rng, words, Pool(rng, words), pairs=1, asked=1, questions=1)
        (row,), (question, answer) = facts.rows, facts.questions[0]
        around = lines(rng, source.length - len(question) - len(row) - 2)
        at = round(len(around) * depth / 100)
        text = [words.bos, *(t for line in around[:at] for t in line), words.newline, *row]
        text += [t for line in around[at:] for t in line]
        found.append(_example(i, text + question, answer, words, source, depth=depth))
    return found


def _needle(like: bool, source: Source) -> list[Example]:
    material = substitute() if like else published(source, {"essay", "words"})
    answer = 32

    def made(index: int, units: int) -> Example:
        rng = random.Random(f"{source.seed}/{source.length}/{index}")
        depth = DEPTHS[index % len(DEPTHS)]
        adjectives, nouns = material.pairs
        key, value = f"{rng.choice(adjectives)}-{rng.choice(nouns)}", str(rng.randint(10**6, 10**7))
        fact = NEEDLE.format(kind="numbers", key=key, value=value)
        start = rng.randrange(len(material.essay))
        repeats = -(-(start + units) // len(material.essay))
        text = " ".join((material.essay * repeats)[start : start + units])
        context = insert_sentences(text, [fact], [depth])
        return Example(
            id=str(index),
            context=(
                "A special magic number is hidden within the following text. Make sure to memorize "
                f"it. I will quiz you about the number afterwards.\n{context}"
            ),
            question=f"\nWhat is the special magic number for {key} mentioned in the provided "
            "text?",
            prefix=f" The special magic number for {key} mentioned in the provided text is",
            answers=(value,), max_new_tokens=answer, extra={"depth": depth},
        )  # fmt: skip

    def fits(index: int, units: int) -> bool:
        example = made(index, units)
        whole = f"{example.context}{example.question}{example.prefix}"
        return len(source.tokenizer.encode(whole)) + answer <= source.length

    found, units = [], source.length // 4
    for index in range(source.count):
        units = largest(functools.partial(fits, index), units)
        if not units:
            raise ValueError(f"{source.length} tokens are too few for a needle")
        found.append(made(index, units))
    return found


def _exact(prediction: str, example: Example) -> float:
    return float(prediction.strip() == example.answers[0].strip())


def _contains(prediction: str, example: Example) -> float:
    return substring_all(prediction, example.answers)


def tasks() -> list[Task]:
    """own/<task>, own/needle, needle and needle_like."""
    found = [
        Task(name=f"own/{name}", make=functools.partial(_family, name), score=_exact, binary=True)
        for name in OWN_TASKS
    ]
    return [
        *found,
        Task(name="own/needle", make=_own_needle, score=_exact, binary=True),
        Task(name="needle", make=functools.partial(_needle, False), score=_contains, binary=True),
        Task(
            name="needle_like", make=functools.partial(_needle, True), score=_contains, binary=True
        ),
    ]
