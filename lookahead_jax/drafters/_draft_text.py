"""The text of a request in draft tokens, encoded anew at its end as it grows."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.drafters._vocabulary_map import Piece, VocabularyMap, align, text_of

_BEHIND = 10  # draft tokens that are encoded again, as in transformers' universal assistance
_FARTHER = 3 * _BEHIND  # further ones, to begin at white space if there is any


class DraftText:
    """Target tokens come in with `append`, and `read` encodes their text.

    It reads up to the last whole character. What follows the `prompt` teaches the map, which all
    requests share, how the two tokenizers differ.
    """

    def __init__(self, draft: Tokenizer, vocabularies: VocabularyMap, prompt: Sequence[int]):
        self._draft, self._map = draft, vocabularies
        self._text = bytearray()
        self._tokens: list[int] = []  # of the target
        self._ends: list[int] = []  # where their bytes end
        self.ids: list[int] = []
        """Draft tokens of the text that has been read."""
        self._starts: list[int | None] = []  # where their bytes begin; None: unknown
        self._read = 0  # bytes
        self.append(prompt)
        self._private = len(self._text)  # bytes that teach nothing
        self.read()

    def append(self, tokens: Sequence[int]) -> None:
        """The target's next tokens."""
        for token in tokens:
            self._text += text_of(self._map.target_texts, token)
            self._tokens.append(token)
            self._ends.append(len(self._text))

    def read(self) -> None:
        """Encodes the new text; the last draft tokens may change."""
        end = _whole_characters(self._text)
        if end <= self._read:
            return
        kept, begin = self._place_to_begin()
        window = bytes(self._text[begin:end])
        ids = self._draft.encode_behind(window.decode(errors="replace"))
        texts = [text_of(self._map.texts, token) for token in ids]
        *starts, _ = accumulate(map(len, texts), initial=begin)
        # Tokenizers that change a text, and bytes that are no text, leave the places unknown.
        exact = b"".join(texts) == window
        self.ids[kept:] = ids
        self._starts[kept:] = starts if exact else [None] * len(ids)
        self._read = end
        if exact:
            self._teach(list(zip(ids, starts[1:], strict=False)), begin)

    @property
    def unread(self) -> bytes:
        """The bytes at the end that are not yet a character."""
        return bytes(self._text[self._read :])

    @property
    def last(self) -> bytes:
        """The bytes of the last draft token; empty if it has no known place."""
        start = self._starts[-1] if self._starts else None
        return b"" if start is None else bytes(self._text[start : self._read])

    def _place_to_begin(self) -> tuple[int, int]:
        """The draft token from which to encode, and its byte: at white space, if any is nearby.

        Tokenizers split a text there, whatever stands before it.
        """
        size = len(self.ids)
        last = max(size - _BEHIND, 0)
        for at in range(last, max(last - _FARTHER, 0) - 1, -1) if size else ():
            start = self._starts[at]
            if start == 0 or (start is not None and self._text[start] in b" \n\t"):
                return at, start
        for at in range(last, size):
            start = self._starts[at]
            if start is not None and not 0x80 <= self._text[start] < 0xC0:  # begins a character
                return at, start
        return size, self._read

    def _teach(self, draft: list[Piece], begin: int) -> None:
        """What both tokenizers spell from `begin` on; the last draft token, which may change, is
        not among `draft`."""
        first = bisect_right(self._ends, max(begin, self._private))
        boundaries = {begin, *(end for _, end in draft)}
        while first < len(self._ends) and self._begin_of(first) not in boundaries:
            first += 1
        begin = self._begin_of(first)
        draft = [piece for piece in draft if piece[1] > begin]
        target = list(zip(self._tokens[first:], self._ends[first:], strict=True))
        for run in align(draft, target):
            self._map.learn(*run)

    def _begin_of(self, token: int) -> int:
        """Where a token of the target begins."""
        return self._ends[token - 1] if token else 0


def _whole_characters(text: bytearray) -> int:
    """The length of `text` without a UTF-8 character that its end leaves incomplete."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte >= 0xC0:
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(text) - back if size > back else len(text)
        if byte < 0x80:
            break
    return len(text)
