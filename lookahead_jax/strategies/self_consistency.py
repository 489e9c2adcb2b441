"""Self-consistency: several samples, of which the most frequent answer chooses one."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from lookahead_jax.decoding.sampling import Sampling
from lookahead_jax.strategies.base import Ranked, check_pattern
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.samples import Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfConsistency(Samples):
    """The first sample with the answer that most samples have.

    An answer is the last match of the regular expression `pattern` (its last group, if it has
    groups), without commas and outer spaces; samples without one do not vote. Of equally frequent
    answers the earliest wins. (Wang et al. 2023, arXiv:2203.11171: 40 samples, temperature 0.7,
    top-k 40.)
    """

    default_sampling: ClassVar[Sampling] = Sampling(temperature=0.7, top_k=40)
    n: int = 40
    pattern: str = r"-?\d[\d,]*(?:\.\d+)?"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern("pattern", self.pattern)

    def answer(self, text: str) -> str | None:
        """The answer in a text."""
        found = list(re.finditer(self.pattern, text))
        if not found:
            return None
        group = found[-1].group(found[-1].re.groups)
        return None if group is None else normal(group)

    def votes(self, texts: Sequence[str]) -> list[float]:
        """How many of the texts have the answer of each; 0 for one without an answer."""
        answers = [self.answer(text) for text in texts]
        count = collections.Counter(answer for answer in answers if answer is not None)
        return [0.0 if answer is None else float(count[answer]) for answer in answers]

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        if rows.model.tokenizer is None:
            raise ValueError(
                "SelfConsistency compares answers in texts, and this model has no tokenizer.json"
            )
        rows.advance()
        return [self.voted(rows, group.tolist()) for group in rows.groups]

    def voted(self, rows: Rows, candidates: Sequence[int]) -> Ranked:
        """The choice among a prompt's rows `candidates`, its first ones."""
        outputs = rows.outputs
        votes = self.votes([outputs[row].text for row in candidates])
        return Ranked(int(np.argmax(votes)), [*votes])


def normal(answer: str) -> str:
    """An answer as it is compared: without commas and outer spaces."""
    return answer.replace(",", "").strip()
