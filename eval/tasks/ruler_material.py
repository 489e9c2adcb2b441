"""The material of RULER's prompts: essays, words, and substitutes for them."""

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lookahead_jax.eval.tasks.base import Source
from lookahead_jax.eval.tasks.own import words as own_words
from lookahead_jax.eval.tasks.own.code import HELDOUT


class RulerMaterial(NamedTuple):
    """The essay and the words that prompts are made of."""

    essay: list[str]  # words
    words: list[str]
    pairs: tuple[list[str], list[str]]  # adjectives, nouns


@functools.cache
def essay(path: Path) -> list[str]:
    """The words of the essays in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        text = json.loads(text)["text"]
    return re.sub(r"\s+", " ", text).split(" ")


@functools.cache
def published_words(path: Path | None) -> dict[str, list[str]]:
    """nouns, adjectives and verbs of `wonderwords`, from a file or from the package."""
    if path is not None:
        return json.loads(path.read_text(encoding="utf-8"))
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "RULER's words are those of wonderwords: install it, or put ruler/words.json into the "
            "--data folder; ruler_like/... runs with other words"
        )
    folder = Path(spec.origin).parent / "assets"
    kinds = {"nouns": "noun", "adjectives": "adjective", "verbs": "verb"}
    return {
        kind: (folder / f"{name}list.txt").read_text(encoding="utf-8").split()
        for kind, name in kinds.items()
    }


def published(source: Source, needs: set[str]) -> RulerMaterial:
    """RULER's own material, as far as a task needs it."""
    found: list[str] = []
    if "essay" in needs:
        found = essay(source.file("ruler/PaulGrahamEssays.json", "ruler/PaulGrahamEssays.txt"))
    kinds: dict[str, list[str]] = {"nouns": [], "adjectives": [], "verbs": []}
    if "words" in needs:
        try:
            path = source.file("ruler/words.json")
        except FileNotFoundError:
            path = None
        kinds = published_words(path)
    every = sorted({word for part in kinds.values() for word in part})
    return RulerMaterial(found, every, (kinds["adjectives"], kinds["nouns"]))


@functools.cache
def substitute() -> RulerMaterial:
    """Held-out code for essays, the embedded model's task words for words."""
    lines: list[str] = [
        json.loads(line)["text"] for line in HELDOUT.read_text("utf-8").splitlines()
    ]
    names: list[str] = sorted(set(own_words.WORDS.split()))
    half = len(names) // 2
    text: str = " ".join(lines)
    return RulerMaterial(text.split(), names, (names[:half], names[half:]))


def insert_sentences(text: str, sentences: Sequence[str], depths: Sequence[int]) -> str:
    """`sentences` at sentence ends of `text`, at ascending `depths` in percent."""
    whole = re.split(r"(?<=[.!?])\s+", text.strip())
    places = [int(len(whole) * depth / 100) for depth in depths]
    bounds = list(zip([0, *places], [*places, len(whole)], strict=True))
    parts = [" ".join(whole[a:b]) for a, b in bounds]
    mixed = [parts[0]]
    for sentence, part in zip(sentences, parts[1:], strict=True):
        mixed += [sentence, part]
    return " ".join(mixed)
