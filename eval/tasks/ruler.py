"""RULER's 13 tasks (NVIDIA/RULER, arXiv 2404.06654), generated for any length and tokenizer.

Formats and difficulty are those of scripts/data/synthetic and synthetic.yaml; the random choices
are our own, and essays are split into sentences at .!? (the original asks nltk). What the tasks
read is in the data folder:

    ruler/PaulGrahamEssays.json   {"text": ...}; or .txt
    ruler/squad.json              SQuAD dev-v2.0.json
    ruler/hotpotqa.json           hotpot_dev_distractor_v1.json
    ruler/words.json              {"nouns": [...], "adjectives": [...], "verbs": [...]};
                                  the package `wonderwords`, if installed, has them

Without the essays or the words, only `ruler_like/...` runs: the same tasks with held-out code for
essays and a small list of words. Such rows carry that name and are no RULER results.
"""

import functools
import itertools
import json
import random
import string
import uuid
from collections.abc import Callable
from typing import NamedTuple

from lookahead_jax.eval.scorers.text import substring_all, substring_any
from lookahead_jax.eval.tasks.base import Example, Source, Task, largest, listed
from lookahead_jax.eval.tasks.ruler_material import (
    RulerMaterial,
    insert_sentences,
    published,
    substitute,
)
from lookahead_jax.eval.tasks.ruler_qa import qa

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}"
)
NIAH_QUESTION = (
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"


class Text(NamedTuple):
    """A prompt without its answer."""

    context: str
    question: str
    prefix: str
    answers: list[str]


Builder = Callable[[random.Random, int, RulerMaterial, int], Text]
"""(rng, units of haystack, material, length asked for) -> a prompt."""


def _drawn(rng: random.Random, kind: str, material: RulerMaterial) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    adjectives, nouns = material.pairs
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def niah(
    rng: random.Random, units: int, material: RulerMaterial, length: int, *,
    haystack: str, key: str = "words", value: str = "numbers", keys: int = 1, values: int = 1,
    queries: int = 1,
) -> Text:  # fmt: skip
    """Needles `One of the special magic numbers for KEY is: VALUE.` in noise, essays, needles."""
    keys = max(keys, queries)
    found: dict[str, list[str]] = {}
    while len(found) < keys:
        name = _drawn(rng, key, material)
        found.setdefault(name, [_drawn(rng, value, material) for _ in range(values)])
    needles = [NEEDLE.format(kind=value, key=k, value=v) for k, vs in found.items() for v in vs]
    rng.shuffle(needles)
    if haystack == "essay":
        repeats = -(-units // len(material.essay))
        text = " ".join((material.essay * repeats)[:units])
        # The published 40 depths from 0 to 100 percent.
        depths = sorted(rng.sample([round(100 * i / 39) for i in range(40)], len(needles)))
        context = insert_sentences(text, needles, depths)
    else:
        lines = [
            NOISE
            if haystack == "noise"
            else NEEDLE.format(
                kind=value, key=_drawn(rng, key, material), value=_drawn(rng, value, material)
            )
            for _ in range(units)
        ]
        for needle in needles:
            lines.insert(rng.randint(0, len(lines)), needle)
        context = "\n".join(lines)
    asked = rng.sample(list(found), queries)
    parts = [NIAH, NIAH_QUESTION, NIAH_PREFIX]
    kind = value
    if queries * values == 1:
        parts = [
            part.replace("Some", "A").replace("are all", "is").replace("are", "is")
            for part in parts
        ]
        kind = value[:-1]
    prompt, question, prefix = (
        part.replace("{kind}", kind).replace("{query}", listed(asked)).replace("{context}", context)
        for part in parts
    )
    return Text(prompt, question, prefix, [v for name in asked for v in found[name]])


def _chain(rng: random.Random, letters: int, value: str) -> tuple[list[str], list[str]]:
    """Five variables, each assigned to the next, and the lines that say so."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
    return names, lines


def vt(rng: random.Random, units: int, material: RulerMaterial, length: int) -> Text:
    """A chain of four assignments in noise, after one short solved example."""

    def one(letters: int, units: int) -> tuple[str, str, str, list[str]]:
        value = str(rng.randint(10000, 99998))
        names, chain = _chain(rng, letters, value)
        lines = [NOISE] * units
        places = sorted(rng.sample(range(max(units, len(chain))), len(chain)))
        for i, (place, line) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + i, line)
        context = "\n".join(lines).replace(". \n", ".\n")
        head = (
            "Memorize and track the chain(s) of variable assignment hidden in the following "
            f"text.\n\n{context}"
        )
        question = (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        )
        prefix = (
            " Answer: According to the chain(s) of variable assignment in the text above, 5 "
            f"variables are assigned the value {value}, they are: "
        )
        return head, question, prefix, names

    # The published example fills up to 500 tokens: about 15 lines of noise.
    shown = one(3, 15)
    head, question, prefix, names = one(5, units)
    return Text(f"{''.join(shown[:3])} {' '.join(shown[3])}\n\n{head}", question, prefix, names)


def cwe(rng: random.Random, units: int, material: RulerMaterial, length: int) -> Text:
    """The ten words that a numbered list repeats most, after one short solved example."""
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"

    def numbered(words: list[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))

    def one(words: int, common: int, rare: int) -> tuple[str, list[str]]:
        stock = material.words
        if words > len(stock):  # the original has a longer list, which is not published
            stock = [f"{a}-{b}" for a in stock for b in stock[: words // len(stock) + 1]]
        drawn = rng.sample(stock, max(words, 10))
        every = drawn[:10] * common + drawn[10:] * rare
        rng.shuffle(every)
        return head + numbered(every), drawn[:10]

    small = length < 4096
    shown, solved = one(*((20, 3, 1) if small else (40, 10, 3)))
    context, answers = one(units, *((6, 1) if small else (30, 3)))
    return Text(
        f"{shown}{question}{prefix} {numbered(solved)}\n{context}", question, prefix, answers
    )


def fwe(rng: random.Random, units: int, material: RulerMaterial, length: int) -> Text:
    """The three most frequent of invented words, whose frequencies fall with the rank squared."""
    size = max(length // 50, 5)
    names: set[str] = set()
    while len(names) < size:
        names.add("".join(rng.choices(string.ascii_lowercase, k=6)))
    vocabulary = sorted(names)
    rng.shuffle(vocabulary)
    vocabulary[0] = "..."
    zeta = 1.6449340668482264  # of 2
    coded = [
        word
        for rank, word in enumerate(vocabulary, 1)
        for _ in range(int(units * rank**-2.0 / zeta))
    ]
    rng.shuffle(coded)
    context = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(coded)}"
    )
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?"
    )
    prefix = (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    return Text(context, question, prefix, vocabulary[1:4])


_PLAIN = {
    "niah_single_1": (functools.partial(niah, haystack="noise"), 128),
    "niah_single_2": (functools.partial(niah, haystack="essay"), 128),
    "niah_single_3": (functools.partial(niah, haystack="essay", value="uuids"), 128),
    "niah_multikey_1": (functools.partial(niah, haystack="essay", keys=4), 128),
    "niah_multikey_2": (functools.partial(niah, haystack="needle"), 128),
    "niah_multikey_3": (
        functools.partial(niah, haystack="needle", key="uuids", value="uuids"),
        128,
    ),
    "niah_multivalue": (functools.partial(niah, haystack="essay", values=4), 128),
    "niah_multiquery": (functools.partial(niah, haystack="essay", queries=4), 128),
    "vt": (vt, 30),
    "cwe": (cwe, 120),
    "fwe": (fwe, 50),
}
"""Name -> how prompts are built, and the tokens that the answer may have."""


def _needs(name: str) -> set[str]:
    build = _PLAIN[name][0]
    settings = build.keywords if isinstance(build, functools.partial) else {}
    needs = {"essay"} if settings.get("haystack") == "essay" else set()
    if name == "cwe" or ("haystack" in settings and settings.get("key") != "uuids"):
        needs.add("words")
    return needs


def fitted(source: Source, build: Builder, material: RulerMaterial, answer: int) -> list[Text]:
    """`source.count` prompts that, with `answer` tokens more, take at most `source.length`.

    As many units of haystack as fit into the first prompt; a prompt that comes out longer loses
    one in a hundred until it fits.
    """

    def made(index: int, units: int) -> Text:
        rng = random.Random(f"{source.seed}/{source.length}/{index}")
        return build(rng, units, material, source.length)

    def fits(text: Text) -> bool:
        whole = text.context + text.question + text.prefix
        return len(source.tokenizer.encode(whole)) + answer <= source.length

    smallest = 5  # sentences that hold a chain
    start = max(smallest, source.length // 64)
    units = largest(lambda n: fits(made(0, max(n, smallest))), start)
    if units < smallest:
        raise ValueError(f"{source.length} tokens are too few for this task")
    found = []
    for index in range(source.count):
        size = units
        while not fits(text := made(index, size)):
            size -= max(1, size // 100)
            if size < smallest:
                raise ValueError(f"example {index} does not fit into {source.length} tokens")
        found.append(text)
    return found


def _make(name: str, material: Callable[[Source], RulerMaterial], source: Source) -> list[Example]:
    build, answer = _PLAIN[name]
    texts = fitted(source, build, material(source), answer)
    return [
        Example(
            id=str(i), context=text.context, question=text.question, prefix=text.prefix,
            answers=tuple(text.answers), max_new_tokens=answer,
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip


def _score_all(prediction: str, example: Example) -> float:
    return substring_all(prediction, example.answers)


def _score_any(prediction: str, example: Example) -> float:
    return substring_any(prediction, example.answers)


def _qa(file: str, source: Source) -> list[Example]:
    path = source.file(f"ruler/{file}.json")
    return qa(source, json.loads(path.read_text(encoding="utf-8")), file)


def tasks() -> list[Task]:
    """The 13 tasks, and the 11 that have substitutes for the published material."""
    found = []
    for name in _PLAIN:
        ways: dict[str, Callable[[Source], RulerMaterial]] = {
            "ruler": functools.partial(published, needs=_needs(name)),
            "ruler_like": lambda source: substitute(),
        }
        for family, material in ways.items():
            if family == "ruler_like" and not _needs(name):
                continue  # it has no substitute
            make = functools.partial(_make, name, material)
            one = name.startswith(("niah_single", "niah_multikey"))  # answer, found or not
            found.append(Task(name=f"{family}/{name}", make=make, score=_score_all, binary=one))
    for name, file in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
        make = functools.partial(_qa, file)
        found.append(Task(name=f"ruler/{name}", make=make, score=_score_any, binary=True))
    return found
