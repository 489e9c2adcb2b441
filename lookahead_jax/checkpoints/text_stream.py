"""Text of tokens that arrive one at a time."""

from collections.abc import Callable, Sequence

_HELD = "\ufffd"  # how decoders show bytes that are not (yet) a character
_CONTEXT = 8  # tokens of the prompt before a continuation, at first


class TextStream:
    """Turns tokens into text as they arrive; the pieces add up to `decode` of all tokens.

    With a prompt, they add up to what `decode` gives for prompt and tokens beyond that of the
    prompt. Text is held back while it ends in U+FFFD, since a later token may complete the
    character. One difference remains: byte-fallback decoders (Llama 2) replace a whole run of byte
    tokens once one of them is invalid, and streamed text is not taken back. (That, and the
    characters still incomplete at the end, is why this is not `tokenizers.decoders.DecodeStream`:
    it raises on the first and drops the second.)
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        skipped: frozenset[int],
        prompt: Sequence[int],
    ):
        self._decode = decode
        self._skipped = skipped  # ids that `decode` omits
        # Decoders treat the first token specially (they strip its space), so each new piece is
        # decoded after the piece before it.
        self._context = self._last_words(prompt)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` settles; often a word, sometimes empty."""
        if token in self._skipped:
            return ""
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(_HELD):
            return ""
        if self._decode(self._pending).startswith(_HELD):  # it ends a character of the context
            self._pending = self._context + self._pending
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """The text still held back, once no more tokens come."""
        text = self._new_text()
        self._context, self._pending = self._context + self._pending, []
        return text

    def _last_words(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt: at least one with text, from the start of a character."""
        size = _CONTEXT
        while True:
            words = [token for token in prompt[-size:] if token not in self._skipped]
            text = self._decode(words)
            if size >= len(prompt) or (text and not text.startswith(_HELD)):
                return words
            size *= 2

    def _new_text(self) -> str:
        before, text = self._decode(self._context), self._decode(self._context + self._pending)
        if not text.startswith(before):  # the prompt left a character incomplete
            complete = self._context
            while before.endswith(_HELD):
                complete = complete[:-1]
                before = self._decode(complete)
        return text[len(before) :]
