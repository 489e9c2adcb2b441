"""One request's output on the host: tokens become text as it is certain; stop strings end it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

Finish = Literal["eos", "stop", "length"]


@runtime_checkable
class TextStream(Protocol):
    """Turns one token after the other into text."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@runtime_checkable
class Decoder(Protocol):
    """A tokenizer, as far as streaming needs it."""

    def stream(self) -> TextStream: ...


class OutputRow:
    """Receives a row's tokens in any portions and knows its text, its end and why it ended.

    Text that may still turn out to be the beginning of a stop string is held back. The tokens
    kept are those up to the one that completes a stop string; the text ends before it.
    """

    def __init__(
        self,
        tokenizer: Decoder | None,
        stop: Sequence[str],
        on_text: Callable[[str], None] | None,
    ):
        if isinstance(stop, str):
            raise ValueError(f"stop strings are a list: give [{stop!r}]")
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        if any(not s for s in stop):
            raise ValueError("a stop string is empty")
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = None if tokenizer is None else tokenizer.stream()
        self._on_text = on_text
        self._shown = 0

    def feed(self, tokens: Iterable[int]) -> None:
        """Takes the next tokens; those after a stop string are ignored."""
        for token in tokens:
            if self.stopped:
                return
            self.tokens.append(int(token))
            if self._decoder is not None:
                self._grow(self._decoder.push(int(token)))
        self._show(len(self.text) - self._held_back())

    def close(self) -> None:
        """Shows what was held back; the row gets no more tokens."""
        if self._decoder is not None and not self.stopped:
            self._grow(self._decoder.finish())
        self._show(len(self.text))

    def finish(self, eos_ids: Sequence[int]) -> Finish:
        """Why the row ended."""
        if self.stopped:
            return "stop"
        return "eos" if self.tokens and self.tokens[-1] in eos_ids else "length"

    def _grow(self, piece: str) -> None:
        longest = max((len(s) for s in self._stop), default=0)
        begin = max(len(self.text) - longest + 1, 0)
        self.text += piece
        found = [at for s in self._stop if (at := self.text.find(s, begin)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.stopped:
            return 0
        longest = 0
        for stop in self._stop:
            tail = self.text[max(len(self.text) - len(stop) + 1, 0) :]
            at = tail.find(stop[0])
            while at >= 0 and not stop.startswith(tail[at:]):
                at = tail.find(stop[0], at + 1)
            longest = max(longest, len(tail) - at if at >= 0 else 0)
        return longest

    def _show(self, end: int) -> None:
        if self._on_text is not None and end > self._shown:
            self._on_text(self.text[self._shown : end])
        self._shown = max(self._shown, end)
