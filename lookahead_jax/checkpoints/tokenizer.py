"""Text to token ids and back, and chat templates, as a Hugging Face directory defines them."""

import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lookahead_jax.checkpoints.hf_files import MAX_JSON_BYTES, find, read_json

_MAX_TOKENIZER_BYTES = 2**28
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_HELD = "\ufffd"  # how decoders show bytes that are not (yet) a character
_CONTEXT = 8  # tokens of the prompt before a continuation, at first


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the special tokens and chat templates of its directory."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    """Role ("bos_token", "eos_token", ...) -> token, as chat templates see them."""
    chat_templates: Mapping[str, str]
    """Name -> Jinja source; the usual one is called "default"."""

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer | None":
        """Reads tokenizer.json and what belongs to it; None if there is no tokenizer.json.

        Raises:
          ValueError: when a file is malformed, too large or outside the directory.
        """
        directory = Path(directory)
        path = find(directory, "tokenizer.json", limit=_MAX_TOKENIZER_BYTES)
        if path is None:
            return None
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path}: not a valid tokenizer ({error})") from error
        # Files keep the settings of their last use in training; callers batch on their own.
        backend.no_padding()
        backend.no_truncation()
        settings = read_json(directory, "tokenizer_config.json") or {}
        roles = (read_json(directory, "special_tokens_map.json") or {}) | settings
        special = {role: _content(roles.get(role)) for role in _SPECIAL_TOKENS}
        return cls(
            backend=backend,
            special_tokens={role: token for role, token in special.items() if token},
            chat_templates=_chat_templates(directory, settings),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that `decode` skips by default."""
        return frozenset(self._special_contents)

    @functools.cached_property
    def _special_contents(self) -> Mapping[int, str]:
        added = self.backend.get_added_tokens_decoder()
        return {id: token.content for id, token in added.items() if token.special}

    def special_text(self, token: int) -> str:
        """The content of a token that `decode` skips by default; empty for other tokens."""
        return self._special_contents.get(token, "")

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its content, or None."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; with `special`, what the tokenizer puts around a text (BOS, ...) is added.

        Text rendered by a chat template brings its own: encode it with special=False.

        Raises:
          ValueError: when the text cannot be encoded, such as lone surrogates.
        """
        return self.encode_with_offsets(text, special=special)[0]

    def encode_with_offsets(
        self, text: str, *, special: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the characters text[start:end] it stands for.

        Tokens that share one character share its span; added special tokens have an empty one.
        """
        try:
            encoding = self.backend.encode(text, add_special_tokens=special)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"the text cannot be tokenized ({error})") from error
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; bytes that form no character come out as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_continuation(
        self, prompt: Sequence[int], ids: Sequence[int], *, skip_special: bool = True
    ) -> str:
        """The text that `ids` add behind the tokens of `prompt`.

        `decode(ids)` would lose a leading space with decoders that strip it from the beginning of
        a text (Llama 2, Mistral).
        """
        stream = self.stream(prompt=prompt, skip_special=skip_special)
        return "".join([*(stream.push(token) for token in ids), stream.finish()])

    def stream(self, *, prompt: Sequence[int] = (), skip_special: bool = True) -> "TextStream":
        """A decoder for tokens that arrive one at a time behind the tokens of `prompt`."""
        return TextStream(self, prompt=prompt, skip_special=skip_special)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The chat as one text; encode it with special=False.

        Args:
          messages: {"role": ..., "content": ...} each.
          add_generation_prompt: end where the assistant's answer begins.
          tools: JSON schemas of functions, for templates that know them.
          template: name of one of `chat_templates`; None takes "tool_use" when tools are given
            and it exists, else "default".
          variables: further names the template may read, such as enable_thinking.

        Raises:
          ValueError: when there is no such template, or it fails on these messages.
        """
        if template is None:
            named = tools is not None and "tool_use" in self.chat_templates
            template = "tool_use" if named else "default"
        if template not in self.chat_templates:
            known = ", ".join(sorted(self.chat_templates)) or "none"
            raise ValueError(f"the tokenizer has no chat template {template!r} (it has: {known})")
        try:
            return _compile(self.chat_templates[template]).render(
                dict(self.special_tokens)
                | variables
                | {
                    "messages": [dict(message) for message in messages],
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        # A template is a program: besides its own errors it can raise any of Python's.
        except Exception as error:
            raise ValueError(f"the chat template {template!r} failed: {error}") from error


class TextStream:
    """Turns tokens into text as they arrive; the pieces add up to `decode` of all tokens.

    With a prompt, they add up to what `decode` gives for prompt and tokens beyond that of the
    prompt. Text is held back while it ends in U+FFFD, since a later token may complete the
    character. One difference remains: byte-fallback decoders (Llama 2) replace a whole run of byte
    tokens once one of them is invalid, and streamed text is not taken back. (That, and the
    characters still incomplete at the end, is why this is not `tokenizers.decoders.DecodeStream`:
    it raises on the first and drops the second.)
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt: Sequence[int], skip_special: bool):
        self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        # Decoders treat the first token specially (they strip its space), so each new piece is
        # decoded behind the piece before it.
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


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's part for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """A template in the sandbox that chat templates are written for (as transformers has it)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes HTML characters, which models were not trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _content(token: Any) -> str | None:
    """Special tokens are written as text or as an object that holds it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name; chat_template.jinja wins over tokenizer_config.json."""
    path = find(directory, "chat_template.jinja", limit=MAX_JSON_BYTES)
    if path is not None:
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    template = settings.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        named = {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{directory}: chat_template is neither text nor named texts") from error
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ValueError(f"{directory}: chat_template is neither text nor named texts")
    return named
