"""TrimR: thinking ends where a verifier finds it converged or lost, or where it circles."""

import collections
import dataclasses
import re
from typing import Any, ClassVar

import numpy as np

from lookahead_jax.decoding.state import seen_tokens
from lookahead_jax.generation.output_text import OutputRow
from lookahead_jax.strategies.base import Ranked, Strategy, check_at_least, check_pattern, not_empty
from lookahead_jax.strategies.rows import Rows
from lookahead_jax.strategies.texts import read_texts, rewritten

_BASE, _PRIME = 1_000_003, 2**61 - 1
_SENTENCE_END = re.compile(r"[.!?]\s+|\n+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrimR(Strategy):
    """Ends thinking that has an answer again and again, that finds none, or that circles.

    The thinking lasts up to `end` and is cut into thoughts before each match of `pattern`. The
    verifier is asked whether the last `sentences` sentences of a thought, if it has `shortest`
    words, answer the prompt, and then whether they agree with the last ones that did. After
    `agreements` agreements in a row `mild` is added to the text, and thoughts are no longer
    verified. `forced` is added at the end of a thought once `share` of the row's tokens are written
    and there are `thoughts` thoughts, and wherever the last `loop_tokens` tokens were written for
    the `loops`-th time. An addition counts as written; it is left out where it does not fit.

    (Lin et al. 2025, arXiv:2505.17155: `agreements`, `thoughts` and `share` are theirs, as are the
    yes or no questions, of which the more probable reply counts. Their code is not published: the
    wording of `forced` in part, the list of reflections, `sentences`, `shortest` and the lengths of
    loops are ours. They verify while the model goes on; here the row waits.)
    """

    draws: ClassVar[bool | None] = None
    verifies: ClassVar[bool] = True
    agreements: int = 2
    thoughts: int = 20
    share: float = 0.5
    sentences: int = 5
    shortest: int = 10
    loop_tokens: int = 64
    loops: int = 3
    pattern: str = r"\n\n(?:Wait|But|Alternatively|Hmm)"
    end: str = "</think>"
    mild: str = "\n\n**Final Answer**\n"
    forced: str = "\n\nI think I already thought for a long time. I answer now.\n</think>\n\n"

    def __post_init__(self) -> None:
        for name in ("agreements", "sentences", "loop_tokens"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("thoughts", "shortest"):
            check_at_least(name, getattr(self, name), 0)
        check_at_least("loops", self.loops, 2)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} is not possible: give 0 to 1")
        check_pattern("pattern", self.pattern)
        for name in ("end", "mild", "forced"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give the text")

    def run(self, rows: Rows) -> list[Ranked]:
        """Moves the rows to their ends; one answer for each prompt."""
        tokenizer: Any = rows.model.tokenizer
        if tokenizer is None:
            raise ValueError("TrimR reads the thinking, and this model has no tokenizer.json")
        additions = {text: tokenizer.encode_behind(text) for text in (self.mild, self.forced)}
        minds = [_Thinking(self, tokenizer.special_text) for _ in rows.texts]

        def pauses(row: int) -> bool:
            return minds[row].notices(rows.outputs[row])

        rows.pause(pauses)
        while True:
            rows.advance(until=pauses)
            added = {}
            for row in np.flatnonzero(~rows.finished).tolist():
                mind = minds[row]
                text = self.forced if mind.circles else self._judge(rows, row, mind)
                if text is not None:
                    mind.told(text)
                    added[row] = additions[text]
            rows.resume()
            self._add(rows, added)
            if not rows.running.any():
                return [Ranked(0, [None]) for _ in rows.texts]

    def _judge(self, rows: Rows, row: int, mind: "_Thinking") -> str | None:
        """What the text needs at the end of a thought."""
        if len(mind.thought.split()) >= self.shortest:
            answer = last_sentences(mind.thought, self.sentences)
            if rows.verify(row, answer):
                same = mind.answer is not None and rows.verify(row, answer, mind.answer)
                mind.agreed = mind.agreed + 1 if same else 0
                mind.answer = answer
                if mind.agreed >= self.agreements:
                    return self.mild
        written, most = len(rows.outputs[row].tokens), int(rows.state.limit[row])
        lost = written >= self.share * most and mind.thoughts >= self.thoughts
        return self.forced if lost else None

    def _add(self, rows: Rows, added: dict[int, list[int]]) -> None:
        """Adds tokens to the ends of rows, where these and one more fit."""
        texts = [list(output.tokens) for output in rows.outputs]
        asked = np.zeros(len(texts), bool)
        for row, tokens in added.items():
            room = int(rows.state.limit[row]) - len(texts[row])
            if len(tokens) < room and rows.affords(row, len(tokens), forwards=2):
                texts[row] += tokens
                asked[row] = True
        if not asked.any():
            return
        state = rewritten(rows, texts)
        if state.seen is not None:
            seen = state.seen | seen_tokens(state.tokens, state.seen.shape[1])
            state = dataclasses.replace(state, seen=seen)
        rows.replace(state)
        read_texts(rows, texts, asked)


class _Thinking:
    """One row's thinking, followed token by token."""

    def __init__(self, rule: TrimR, special_text: Any):
        self.thought = ""  # the last that has ended
        self.thoughts = 0
        self.answer: str | None = None
        self.agreed = 0
        self.circles = False
        self._rule = rule
        self._special_text = special_text
        self._pattern = re.compile(rule.pattern)
        self._loops = _Loops(rule.loop_tokens)
        self._watched = {"thoughts", "loops"}
        self._begin = 0  # of the present thought
        self._after = 0  # the reflection that begins it
        self._read = 0  # tokens

    def notices(self, output: OutputRow) -> bool:
        """Whether a thought ends, or the text circles, with the last token."""
        new = output.tokens[self._read :]
        begin = output.offsets[self._read] if new else len(output.text)
        self._read += len(new)
        repeats = max([self._loops.count(token) for token in new], default=0)
        if not self._watched:
            return False
        end = self._rule.end
        if end in output.text[max(begin - len(end), 0) :] or any(
            end in self._special_text(token) for token in new
        ):
            self._watched = set()
            return False
        self.circles = repeats >= self._rule.loops
        found = self._pattern.search(output.text, self._after)
        if found is None or "thoughts" not in self._watched:
            return self.circles
        not_empty("pattern", found)
        self.thought = output.text[self._begin : found.start()]
        self.thoughts += 1
        self._begin, self._after = found.span()
        return True

    def told(self, addition: str) -> None:
        """Takes note of an addition to the text."""
        self._watched = {"loops"} if addition == self._rule.mild else set()


class _Loops:
    """How often the last `width` tokens have been written, by a rolling hash (Rabin-Karp)."""

    def __init__(self, width: int):
        self._last: collections.deque[int] = collections.deque(maxlen=width)
        self._leaves = pow(_BASE, width, _PRIME)
        self._hash = 0
        self._counts: collections.Counter[int] = collections.Counter()

    def count(self, token: int) -> int:
        """How often, with this one; 0 before there are `width` of them."""
        full = len(self._last) == self._last.maxlen
        gone = (self._last[0] + 1) * self._leaves if full else 0
        self._hash = (self._hash * _BASE + token + 1 - gone) % _PRIME
        self._last.append(token)
        if len(self._last) < (self._last.maxlen or 0):
            return 0
        self._counts[self._hash] += 1
        return self._counts[self._hash]


def last_sentences(text: str, count: int) -> str:
    """The last `count` sentences, or lines, of a text."""
    text = text.strip()
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    return text[ends[-count] if len(ends) >= count else 0 :]
