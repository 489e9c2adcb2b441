"""Text that must meet conditions which its prompt names, so that anyone can check them."""

import re

import numpy as np

from lookahead_jax.eval.tasks.base import Example, Source

TOPICS = (
    "the sea", "a winter morning", "a small town", "an old train", "a garden", "the night sky",
    "a mountain village", "a busy market", "a long journey", "a birthday", "a rainy day", "a farm",
)  # fmt: skip
WORDS = (
    "bridge", "lantern", "river", "window", "letter", "stone", "music", "shadow", "bread", "cloud",
    "garden", "horse", "island", "candle", "forest", "clock", "silver", "road", "teacher", "apple",
)  # fmt: skip
_LETTERS = "jkqvxz"
FEWEST = 5  # words of a text


def constrained(source: Source) -> list[Example]:
    """One sentence on a topic, with two words to use and a letter to avoid."""
    found = []
    for i in range(source.count):
        rng = np.random.default_rng((source.seed, i))
        topic = str(rng.choice(TOPICS))
        words = rng.choice(WORDS, 2, replace=False).tolist()
        letters = [x for x in _LETTERS if not any(x in text for text in (*words, topic))]
        letter = str(rng.choice(letters))
        question = (
            f'Write one sentence about {topic}. Use the words "{words[0]}" and "{words[1]}". Do '
            f'not use the letter "{letter}".'
        )
        found.append(
            Example(
                id=str(i),
                context="",
                question=question,
                max_new_tokens=48,
                extra={"words": words, "letter": letter},
            )
        )
    return found


def share_met(prediction: str, example: Example) -> float:
    """The share of the conditions that the text meets."""
    said = re.findall(r"[^\W\d_]+", prediction.lower())
    met = [
        len(re.findall(r"[.!?]+(?=\s|[\"'”’)]|$)", prediction)) == 1,
        len(said) >= FEWEST,
        example.extra["letter"] not in prediction.lower(),
        *(word in said for word in example.extra["words"]),
        bool(re.search(r"[.!?][\"'”’)]*\s*$", prediction)),
    ]
    return sum(met) / len(met)


def constrained_score(prediction: str, example: Example) -> float:
    """Whether the text meets all conditions."""
    return float(share_met(prediction, example) == 1.0)
