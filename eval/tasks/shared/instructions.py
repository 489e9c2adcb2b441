"""Several instructions and a long text: how many does the answer follow, or repeat?

Eviction can drop whole instructions while the answer stays fluent ("The Pitfalls of KV Cache
Compression", arXiv 2510.00231); instructions and checks are in the manner of IFEval (arXiv
2311.07911).
"""

import random
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from lookahead_jax.eval.tasks.base import Example, Source
from lookahead_jax.eval.tasks.reasoning.constrained import TOPICS, WORDS
from lookahead_jax.eval.tasks.shared.fitting import fitted
from lookahead_jax.eval.tasks.shared.writings import writing

HEAD = "Your answer must follow all of these rules:"
ASKED = 4  # instructions of an example
ROOM = 96  # tokens of an answer
Place = Literal["before", "behind", "pinned"]
Request = Literal["follow", "recite"]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


class Instruction(NamedTuple):
    """What an instruction says, and whether a text follows it."""

    text: str  # {} is its value
    draw: Callable[[random.Random], Any]
    follows: Callable[[str, Any], bool]


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


INSTRUCTIONS = {
    "begin": Instruction(
        'Begin your answer with the word "{}".', _word, lambda t, w: _words(t)[:1] == [w]
    ),
    "end": Instruction(
        'End your answer with the word "{}".', _word, lambda t, w: _words(t)[-1:] == [w]
    ),
    "use": Instruction('Use the word "{}".', _word, lambda t, w: w in _words(t)),
    "number": Instruction(
        "Mention the number {}.",
        lambda rng: rng.randint(100, 999),
        lambda t, n: str(n) in re.findall(r"\d+", t),
    ),
    "lines": Instruction(
        "Write exactly {} lines.",
        lambda rng: rng.randint(2, 4),
        lambda t, n: sum(bool(line.strip()) for line in t.split("\n")) == n,
    ),
    "case": Instruction(
        "Use {} letters only.",
        lambda rng: rng.choice(("capital", "small")),
        lambda t, case: t.isupper() if case == "capital" else t.islower(),
    ),
}
"""Name of its measure -> instruction. None contradicts another: words may have any case."""


def make(request: Request, place: Place, source: Source) -> list[Example]:
    """`ASKED` instructions before or behind a long text, and then the request.

    Models of about 100 million parameters follow few instructions, and can still recite them.
    """

    def build(rng: random.Random, units: int) -> list[Example]:
        asked: dict[str, Any] = {}
        for name in rng.sample(list(INSTRUCTIONS), ASKED):
            while (value := INSTRUCTIONS[name].draw(rng)) in asked.values():
                pass
            asked[name] = value
        lines = [f"- {INSTRUCTIONS[name].text.format(value)}" for name, value in asked.items()]
        rules = f"{HEAD}\n" + "\n".join(lines)
        document = " ".join(writing(rng, rng.choice(TOPICS)) for _ in range(units))
        parts = [rules, f"Text:\n{document}"]
        if place == "behind":
            parts.reverse()
        question = f"Now write a few words about {rng.choice(TOPICS)}, by the rules."
        if request == "recite":
            question = "Now repeat the rules for your answer, word for word."
        return [
            Example(
                id="", context="\n\n".join(parts), question=f"\n\n{question}",
                prefix=f"{HEAD}\n-" if request == "recite" else "",
                answers=tuple(lines), max_new_tokens=ROOM, extra={"asked": asked},
                pin=rules if place == "pinned" else "",
            )
        ]  # fmt: skip

    return fitted(source, build, contexts=source.count, least=1)


def _shares(met: dict[str, bool]) -> dict[str, float]:
    """The share that is met, and each one by name."""
    return {"share": sum(met.values()) / len(met)} | {name: float(m) for name, m in met.items()}


def followed(prediction: str, example: Example) -> dict[str, float]:
    """The share of the instructions that the answer follows, and each of them by name."""
    asked = example.extra["asked"]
    return _shares(
        {name: INSTRUCTIONS[name].follows(prediction, value) for name, value in asked.items()}
    )


def recited(prediction: str, example: Example) -> dict[str, float]:
    """The share of the instructions that the answer repeats, and each of them by name."""
    texts = {n: INSTRUCTIONS[n].text.format(value) for n, value in example.extra["asked"].items()}
    return _shares({name: text in prediction for name, text in texts.items()})
