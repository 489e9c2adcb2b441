"""Similar writings in a long chat, one of which is to be repeated, after OpenAI's MRCR.

Multi-round co-reference resolution (Michelangelo, arXiv 2409.12640; data and grader openai/mrcr):
the user asks for many short writings, some of them for the same kind and topic; at the end the
i-th of these is asked for, behind a random string. Here the writings are composed of a few
sentences and words, in place of a model's, and the earlier answers begin with such strings, too:
models of about 100 million parameters do not write them otherwise.
"""

import difflib
import random
import string

from lookahead_jax.eval.tasks.base import Example, Source
from lookahead_jax.eval.tasks.reasoning.constrained import TOPICS, WORDS
from lookahead_jax.eval.tasks.shared.fitting import fitted

KINDS = ("poem", "story", "song", "letter", "riddle", "speech", "joke", "prayer")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
SENTENCES = (
    "The {0} waits beside the {1}.", "No {0} forgets a {1}.", "Every {0} was once a {1}.",
    "Some call the {0} a {1}.", "A {0} and a {1} never meet.", "Give me your {0} for my {1}.",
    "We lost the {0} under the {1}.", "Only the {0} knows the {1}.",
)  # fmt: skip
ROOM = 96  # tokens of an answer
CODE = 4  # characters of the random string


def writing(rng: random.Random, topic: str) -> str:
    """Two sentences that begin with the topic."""
    pair = rng.sample(SENTENCES, 2)
    body = " ".join(sentence.format(*rng.sample(WORDS, 2)) for sentence in pair)
    return f"{topic[0].upper()}{topic[1:]}! {body}"


def code(rng: random.Random) -> str:
    """A random string, by which an answer shows that it was meant for its request."""
    return "".join(rng.choices(string.ascii_letters + string.digits, k=CODE))


def make(needles: int, source: Source) -> list[Example]:
    """Chats with `needles` writings of the kind and topic that is asked for, among others."""

    def build(rng: random.Random, units: int) -> list[Example]:
        kind, topic = rng.choice(KINDS), rng.choice(TOPICS)
        others = [(k, t) for k in KINDS for t in TOPICS if (k, t) != (kind, topic)]
        asked = [(kind, topic)] * needles + rng.choices(others, k=units - needles)
        rng.shuffle(asked)
        turns: list[tuple[str, str]] = []
        same: list[str] = []
        for k, t in asked:
            text = writing(rng, t)
            while text in same:
                text = writing(rng, t)
            if (k, t) == (kind, topic):
                same.append(text)
            begin = code(rng)
            turns.append((f'Write "{begin}" and a {k} about {t}.', f"{begin} {text}"))
        place, begin = rng.randrange(needles), code(rng)
        question = f'Write "{begin}" and repeat the {ORDINALS[place]} {kind} about {topic}.'
        return [
            Example(
                id="", context="", question=question, turns=tuple(turns),
                answers=(f"{begin} {same[place]}",), max_new_tokens=ROOM, extra={"code": begin},
            )
        ]  # fmt: skip

    return fitted(source, build, contexts=source.count, least=needles + 2)


def score(prediction: str, example: Example) -> dict[str, float]:
    """difflib's ratio of what follows the random string; 0 if the answer does not begin with it.

    Any writing resembles the right one a little; `exact` is whether it is that one, and `begins`
    whether the answer begins with the string.
    """
    begin, (right,) = example.extra["code"], example.answers
    begins = prediction.startswith(begin)
    said, repeated = (text.removeprefix(begin) for text in (prediction, right))
    ratio = difflib.SequenceMatcher(None, said, repeated).ratio() if begins else 0.0
    return {"ratio": ratio, "exact": float(prediction == right), "begins": float(begins)}
