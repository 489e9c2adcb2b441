"""The texts of drafting.py: four kinds of prompts, each with the text that follows in its source.

The model inside the package copies rows of words and no code (three copies of a function before
it, it still does not continue the fourth), so `editing` is written with words: two versions of a
span stand in the document and the later one, every eighth word changed, is asked for. A renamed
copy of real code is there for the drafters that can be replayed on a text without a model.
"""

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tokenizers

from lookahead_jax.eval.tasks.own.code import HELDOUT, code_prompts, code_stream
from lookahead_jax.eval.tasks.own.families import Facts, question
from lookahead_jax.eval.tasks.own.prompts import document, make_example, text_lines
from lookahead_jax.eval.tasks.own.words import Words

DOCUMENT, PROMPT = 512, 384  # tokens; lengths from 257 to 512 share all compiled programs
QUESTIONS = ("multi_lookup", "records", "spans")
SPAN, CHANGED = 32, 8  # words of an edited span; every CHANGED-th word differs


class Text(NamedTuple):
    prompt: list[int]
    truth: list[int]  # the text that follows in the source


class Texts:
    """Held-out text, tokenized."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._words = Words.of(tokenizer)
        self._stream = code_stream(tokenizer, "test", self._words.bos)
        lines = HELDOUT.read_text(encoding="utf-8").splitlines()
        self._files = [json.loads(line)["text"] for line in lines]

    def make(self, kind: str, count: int, tokens: int) -> list[Text]:
        """Up to `count` texts in random order, each with a truth of at most `tokens` tokens."""
        texts = list(getattr(self, f"_{kind}")(count, tokens))
        order = np.random.default_rng(0).permutation(len(texts))[:count]
        return [texts[i] for i in order]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _completion(self, count: int, tokens: int) -> Iterator[Text]:
        """Windows of held-out code."""
        size = PROMPT + tokens
        for row in code_prompts(self._stream, self._words.bos, count=count, length=size):
            yield Text(row[:PROMPT].tolist(), row[PROMPT:].tolist())

    def _question(self, count: int, tokens: int) -> Iterator[Text]:
        """Questions about a document among held-out code."""
        filler = text_lines(self._stream, self._words)
        for i in range(count):
            task = QUESTIONS[i % len(QUESTIONS)]
            example = make_example(task, self._words, seed=(0, i), length=DOCUMENT, filler=filler)
            yield Text(example.prompt.tolist(), example.answer.tolist())

    def _editing(self, count: int, tokens: int) -> Iterator[Text]:
        """`[ tag words ]` and its changed version under another tag; the changed one is asked."""
        words, filler = self._words, text_lines(self._stream, self._words)
        for i in range(count):
            rng = np.random.default_rng((1, i))
            old, new = rng.permutation(words.tags)[:2].tolist()
            drawn = rng.permutation(words.names + words.values).tolist()
            body, spare = drawn[:SPAN], drawn[SPAN:]
            edited = [spare[j] if j % CHANGED == CHANGED - 1 else t for j, t in enumerate(body)]
            begin, end = words.symbols["["], words.symbols["]"]
            rows = [[begin, old, *body, end], [begin, new, *edited, end]]
            asked, answer = question(words, "copy", [new], [new, *edited])
            facts = [Facts(rows, [(asked, answer)])]
            length = DOCUMENT - len(asked)
            yield Text(document(rng, words, facts, length=length, filler=filler) + asked, answer)

    def _free_text(self, count: int, tokens: int) -> Iterator[Text]:
        """Held-out docstrings of prose, cut in the middle; the prompt is the source up to there."""
        for file in self._files:
            for found in re.finditer(r'"""(.*?)"""', file, re.DOTALL):
                body = found.group(1)
                prose = sum(c.isalpha() or c == " " for c in body) > 0.85 * len(body)
                if not prose or len(words := re.findall(r"\S+\s*", body)) < 40:
                    continue
                cut = found.start(1) + len("".join(words[: len(words) // 2]))
                prompt = self._encode(file[:cut].rstrip())
                if len(prompt) >= PROMPT * 3 // 4:
                    rest = file[:cut][len(file[:cut].rstrip()) :] + file[cut : found.end(1)]
                    kept = [self._words.bos, *prompt[1 - PROMPT :]]
                    yield Text(kept, self._encode(rest)[:tokens])

    def _edited_code(self, count: int, tokens: int) -> Iterator[Text]:
        """A held-out function, then a fifth of its copy with the most frequent name changed."""
        for file in self._files:
            try:
                tree = ast.parse(file)
            except SyntaxError:  # the file was cut
                continue
            lines = file.splitlines(keepends=True)
            for node in ast.walk(tree):
                names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
                if not isinstance(node, ast.FunctionDef) or not names:
                    continue
                source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                used = max(sorted(set(names)), key=names.count)
                copy = self._encode(re.sub(rf"\b{used}\b", "other", source))
                before = [self._words.bos, *self._encode(source + "\n\n")]
                cut = len(copy) // 5
                if len(copy) >= 80 and len(before) + cut <= DOCUMENT:
                    yield Text(before + copy[:cut], copy[cut:][:tokens])
