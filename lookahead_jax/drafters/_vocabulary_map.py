"""Target tokens for draft tokens of another tokenizer (OmniDraft, arXiv 2507.02659)."""

import functools
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from lookahead_jax.checkpoints.tokenizer import Tokenizer

LONGEST = 8  # draft tokens of an n-gram; bounds the look-ups per token
_BYTES_OF_A_CHARACTER = 4  # in UTF-8, so as many tokens can share one
Piece = tuple[int, int]  # a token, and where its bytes end in the text


class VocabularyMap:
    """Translates draft tokens; `learn` teaches it how the target spells sequences of them.

    A draft token becomes the target token of equal text. Without one, the target's tokenizer
    spells its text. Draft n-grams whose text the target was seen to spell otherwise, such as with
    one merged token, are kept: at most `capacity`, the one seen least recently is dropped first.
    Unlike the paper's, an n-gram may stand for several target tokens, where no token boundaries of
    the two tokenizers coincide in between.
    """

    def __init__(self, draft: Tokenizer, target: Tokenizer, vocab_size: int, *, capacity: int):
        self.texts = _texts(draft, vocab_size)
        """The bytes of each draft token; empty for an id without a token."""
        self._special = draft.special_ids
        self._target = target
        self.target_texts = _texts(target, target.vocab_size)
        self._of_text, special = _by_text(self.target_texts, target.special_ids)
        mapped = [
            (special if token in self._special else self._of_text).get(text, -1)
            for token, text in enumerate(self.texts)
        ]
        self.direct = np.array(mapped, np.int32)
        """The target token of equal text, -1 without one; special tokens among themselves."""
        self._spell = functools.lru_cache(capacity)(self._spelling)
        self._ngrams: OrderedDict[tuple[int, ...], tuple[int, ...]] = OrderedDict()
        self._capacity = capacity
        ordinary = [i for i, text in enumerate(self.texts) if text and i not in self._special]
        ordinary.sort(key=lambda token: self.texts[token])
        self._sorted = [self.texts[token] for token in ordinary]
        self.rank = np.full(vocab_size, -1, np.int32)
        """The place of each ordinary draft token in the order of texts; -1 for the others."""
        self.rank[ordinary] = np.arange(len(ordinary))
        self._fresh = np.cumsum(self.direct[ordinary] < 0)

    def __len__(self) -> int:
        """N-grams kept."""
        return len(self._ngrams)

    def learn(self, draft: tuple[int, ...], target: tuple[int, ...]) -> None:
        """The target spells the text of the draft tokens with these tokens."""
        if len(draft) > LONGEST:
            return
        if len(draft) == 1 and target == (self.direct[draft[0]],):
            self._ngrams.pop(draft, None)
            return
        self._ngrams[draft] = target
        self._ngrams.move_to_end(draft)
        if len(self._ngrams) > self._capacity:
            self._ngrams.popitem(last=False)

    def translate(self, drafted: Sequence[int], begun: int = 0) -> list[int]:
        """Target tokens for drafted tokens, up to the first ones that have no translation.

        The longest known n-gram is taken at every place. `begun` bytes of the first token's text
        are in the target's text already.
        """
        tokens, at = list[int](), 0
        while at < len(drafted):
            skip = begun if at == 0 else 0
            size, found = (0, ()) if skip else self._known(drafted, at)
            if not size:
                size, found = self._spelled(drafted, at, skip)
            if not size:
                break
            tokens += found
            at += size
        return tokens

    def beginning_with(self, begun: bytes) -> tuple[int, int]:
        """The range of ranks of the draft tokens whose text begins with `begun`."""
        size = len(begun)
        low = bisect_left(self._sorted, begun)
        return low, bisect_right(self._sorted, begun, lo=low, key=lambda text: text[:size])

    def may_continue(self, text: bytes) -> bool:
        """Whether a longer draft token begins with `text` and is no token of the target.

        The target would have emitted a longer token of its own in place of one with this text.
        """
        low, high = self.beginning_with(text)
        return high > low + 1 and bool(self._fresh[high - 1] > self._fresh[low])

    def _known(self, drafted: Sequence[int], at: int) -> tuple[int, tuple[int, ...]]:
        """The longest n-gram at a place: its size, 0 if none is known, and its target tokens."""
        for size in range(min(LONGEST, len(drafted) - at), 0, -1):
            found = self._ngrams.get(tuple(drafted[at : at + size]))
            if found is not None:
                return size, found
        return 0, ()

    def _spelled(self, drafted: Sequence[int], at: int, skip: int) -> tuple[int, tuple[int, ...]]:
        """As `_known`, for the fewest tokens that do not end inside a character."""
        if drafted[at] in self._special:
            mapped = int(self.direct[drafted[at]])
            return (1, (mapped,)) if mapped >= 0 else (0, ())
        text = b""
        for size, token in enumerate(drafted[at : at + _BYTES_OF_A_CHARACTER], 1):
            if token in self._special:
                break
            text += self.texts[token]
            if len(text) == skip:
                return size, ()
            if found := self._spell(text[skip:]):
                return size, found
        found = self._spelling_of_bytes(self.texts[drafted[at]][skip:])
        return (1 if found else 0), found

    def _spelling(self, text: bytes) -> tuple[int, ...]:
        """Target tokens that spell a text; none if it is not whole characters."""
        try:
            whole = text.decode()
        except UnicodeDecodeError:
            return ()
        token = self._of_text.get(text)
        return tuple(self._target.encode_behind(whole)) if token is None else (token,)

    def _spelling_of_bytes(self, text: bytes) -> tuple[int, ...]:
        """Target tokens that spell any bytes, the longest first; none if there are no such."""
        tokens = list[int]()
        while text:
            sizes = range(min(len(text), _BYTES_OF_A_CHARACTER), 0, -1)
            size = next((n for n in sizes if text[:n] in self._of_text), 0)
            if not size:
                return ()
            tokens.append(self._of_text[text[:size]])
            text = text[size:]
        return tuple(tokens)


def align(draft: Sequence[Piece], target: Sequence[Piece]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The shortest runs (draft tokens, target tokens) of equal text, where both begin together."""
    i = j = begin_i = begin_j = 0
    while i < len(draft) and j < len(target):
        ends = draft[i][1], target[j][1]
        if ends[0] == ends[1]:
            yield (
                tuple(token for token, _ in draft[begin_i : i + 1]),
                tuple(token for token, _ in target[begin_j : j + 1]),
            )
            begin_i, begin_j = i + 1, j + 1
        i += ends[0] <= ends[1]
        j += ends[1] <= ends[0]


def text_of(texts: Sequence[bytes], token: int) -> bytes:
    """The bytes of a token; none for an id beyond the tokenizer's."""
    return texts[token] if token < len(texts) else b""


def _texts(tokenizer: Tokenizer, size: int) -> list[bytes]:
    return [tokenizer.token_bytes(token) or b"" for token in range(size)]


def _by_text(
    texts: Sequence[bytes], special_ids: frozenset[int]
) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """The ordinary tokens by their bytes, and the special ones; the lowest id counts."""
    ordinary, special = dict[bytes, int](), dict[bytes, int]()
    for token, text in enumerate(texts):
        if text:
            (special if token in special_ids else ordinary).setdefault(text, token)
    return ordinary, special
