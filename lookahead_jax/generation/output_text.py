"""One request's output on the host: tokens become text; a stop string ends it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

FinishReason = Literal["eos", "stop", "length"]


@runtime_checkable
class StreamingDecoder(Protocol):
    """Turns one token after the other into text."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@runtime_checkable
class StreamingTokenizer(Protocol):
    """What streaming needs of a tokenizer."""

    def special_text(self, token: int) -> str:
        """The content of a token that the text omits; empty for other tokens."""
        ...

    def stream(self, *, prompt: Sequence[int]) -> StreamingDecoder:
        """A decoder of tokens that continue `prompt`."""
        ...


class _StopSearch:
    """A growing text, searched for stop strings."""

    def __init__(self, stop: Sequence[str]):
        self.text = ""
        self._stop = stop
        self._longest = max(map(len, stop), default=0)

    def add(self, piece: str) -> int | None:
        """Appends a piece; where the first stop string that it completes begins, if any."""
        begin = max(len(self.text) - self._longest + 1, 0)
        self.text += piece
        starts = [at for s in self._stop if (at := self.text.find(s, begin)) >= 0]
        return min(starts, default=None)

    def certain(self) -> int:
        """Length of the text before an end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            tail = self.text[max(len(self.text) - len(stop) + 1, 0) :]
            at = tail.find(stop[0])
            while at >= 0 and not stop.startswith(tail[at:]):
                at = tail.find(stop[0], at + 1)
            longest = max(longest, len(tail) - at if at >= 0 else 0)
        return len(self.text) - longest


class OutputRow:
    """Collects a row's tokens and turns them into text, up to the first stop string.

    The text omits special tokens (`<|im_end|>`), but a stop string may be or contain one: it is
    searched for in the text with and without them. Text that may be the beginning of a stop string
    is not yet shown. `tokens` end with the one that completes a stop string; `text` ends before it.
    The text omits an end token too, special or not, as vLLM's does.

    Args:
      prompt: the tokens that the row continues; they decide whether the text begins with a space.
      stop: strings that end the row.
      end_ids: tokens that end the row.
      on_text: receives each piece of text once it is certain.

    Raises ValueError for an empty stop string, and for any without a tokenizer.
    """

    def __init__(
        self,
        tokenizer: StreamingTokenizer | None,
        *,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        end_ids: Sequence[int] = (),
        on_text: Callable[[str], None] | None = None,
    ):
        if isinstance(stop, str):
            raise ValueError(f"stop strings are a list: give [{stop!r}]")
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has no tokenizer.json")
        if any(not s for s in stop):
            raise ValueError("a stop string is empty: leave it out")
        self.tokens: list[int] = []
        self.offsets: list[int] = []  # characters of the text before each token
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = None if tokenizer is None else tokenizer.stream(prompt=prompt)
        self._stop = tuple(stop)
        self._end_ids = frozenset(end_ids)
        self._plain = _StopSearch(self._stop)
        self._marked = _StopSearch(self._stop)  # with special tokens
        self._omitted: list[tuple[int, int]] = []  # where they begin in it, and their lengths
        self._on_text = on_text
        self._shown = 0

    def feed(self, tokens: Iterable[int]) -> None:
        """Takes the next tokens; those after a stop string are ignored."""
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(int(token))
            self.offsets.append(len(self.text))
            if self._decoder is not None and self._tokenizer is not None:
                self._add(self._decoder, int(token), self._tokenizer.special_text(int(token)))
        self._show(self._certain())

    def close(self) -> None:
        """Shows the text that was held back; the row gets no more tokens."""
        if self._decoder is not None and not self.stopped and not self._at_end():
            self._grow(self._decoder.finish(), "")
        self._show(len(self.text))

    def finish(self) -> FinishReason:
        """Why the row ended."""
        if self.stopped:
            return "stop"
        return "eos" if self._at_end() else "length"

    def _at_end(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self._end_ids

    def _certain(self) -> int:
        """Length of the text that no stop string will cut off."""
        if self.stopped or not self._stop:
            return len(self.text)
        return min(self._plain.certain(), self._without_special(self._marked.certain()))

    def _add(self, decoder: StreamingDecoder, token: int, special: str) -> None:
        if token not in self._end_ids:
            self._grow(decoder.push(token), special)
            return
        self._grow(decoder.finish(), "")
        if not self.stopped:
            self._grow("", decoder.push(token) + special)

    def _grow(self, piece: str, special: str) -> None:
        if not self._stop:
            self.text += piece
            return
        ends = [self._plain.add(piece)]
        if special:
            self._omitted.append((len(self._marked.text), len(special)))
        at = self._marked.add(piece + special)
        ends.append(None if at is None else self._without_special(at))
        end = min((end for end in ends if end is not None), default=None)
        self.stopped = end is not None
        self.text = self._plain.text[:end]

    def _without_special(self, at: int) -> int:
        """The place in the text of a place in the text with special tokens."""
        return at - sum(min(length, at - begin) for begin, length in self._omitted if begin < at)

    def _show(self, end: int) -> None:
        if self._on_text is not None and end > self._shown:
            self._on_text(self.text[self._shown : end])
        self._shown = max(self._shown, end)
