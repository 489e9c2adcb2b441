"""Text to token ids and back, and chat templates, as a Hugging Face directory defines them."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lookahead_jax.checkpoints import chat_template
from lookahead_jax.checkpoints.added_tokens import add_declared_tokens
from lookahead_jax.checkpoints.control_tokens import ControlTokens
from lookahead_jax.checkpoints.grammar_vocabulary import grammar_vocabulary
from lookahead_jax.checkpoints.hf_files import find, read_json
from lookahead_jax.checkpoints.text_stream import TextStream
from lookahead_jax.checkpoints.token_bytes import bytes_of_tokens
from lookahead_jax.host.panics import panics_as_errors

_MAX_TOKENIZER_BYTES = 64 * 2**20  # twice the largest known ones, of 260,000 tokens
# The tokenizers package raises bare Exception, and its Rust code panics.
_package_errors = functools.partial(panics_as_errors, errors=(Exception,))


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
        with _package_errors(f"{path}: not a valid tokenizer"):
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        # Files keep the settings of their last use in training; callers batch on their own.
        backend.no_padding()
        backend.no_truncation()
        settings = read_json(directory, "tokenizer_config.json") or {}
        return cls(
            backend=backend,
            special_tokens=add_declared_tokens(backend, directory, settings),
            chat_templates=chat_template.read_templates(directory, settings),
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

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of text that a token stands for; None for an id without a token."""
        content = self.backend.id_to_token(token)
        return None if content is None else self._bytes_of_token(content)

    @functools.cached_property
    def _bytes_of_token(self) -> Callable[[str], bytes]:
        return bytes_of_tokens(self.backend)

    @functools.cached_property
    def grammar_vocabulary(self) -> Any:
        """The vocabulary as llguidance wants it; ValueError without that package."""
        tokens = [self.token_bytes(token) or b"" for token in range(self.vocab_size)]
        return grammar_vocabulary(tokens, self.special_ids, self.encode_behind)

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its content, or None."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, *, special: bool = True, plain: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          text: any text.
          special: add what the tokenizer puts around a text (BOS, ...). Text rendered by a chat
            template brings its own: encode it with special=False.
          plain: encode the strings of control tokens in the text as ordinary characters.

        Raises:
          ValueError: when the text cannot be encoded, such as lone surrogates.
        """
        return self.encode_batch([text], special=special, plain=plain)[0]

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = True, plain: bool = False
    ) -> list[list[int]]:
        """Token ids of several texts, as `encode`; other threads run meanwhile."""
        rows = _encode(self.backend, texts, special)
        if plain:
            acting = [i for i, row in enumerate(rows) if self._has_control(texts[i], row)]
            again = _encode(self._plain_backend, [texts[i] for i in acting], special)
            for i, row in zip(acting, again, strict=True):
                for token in self._control_ids_of(row):
                    raise ValueError(
                        f"cannot encode {self.backend.id_to_token(token)!r} as ordinary text: the "
                        "tokenizer has no other tokens for these characters"
                    )
                rows[i] = row
        return [row.ids for row in rows]

    def encode_behind(self, text: str, *, plain: bool = False) -> list[int]:
        """Token ids of a text that follows another one, such as a question.

        Nothing is put around it, nor the space that some tokenizers (Llama 2) put in front of a
        text. Raises ValueError as `encode`.
        """
        # Encoded after a line break, which is then taken off.
        newline = self.encode("\n", special=False)
        behind = self.encode("\n" + text, special=False, plain=plain)
        if behind[: len(newline)] == newline:
            return behind[len(newline) :]
        return self.encode(text, special=False, plain=plain)

    def encode_with_offsets(
        self, text: str, *, special: bool = True, plain: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the characters text[start:end] it stands for.

        Tokens that share one character share its span; added special tokens have an empty one.
        """
        with _package_errors("the text cannot be tokenized"):
            encoding = self.backend.encode(text, add_special_tokens=special)
            if plain and self._has_control(text, encoding):
                encoding = self._plain_backend.encode(text, add_special_tokens=special)
        return encoding.ids, encoding.offsets

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        plain: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a chat; the other arguments are those of `render_chat`.

        With `plain`, the control tokens of the template act, and those in messages,
        tools or variables are ordinary characters. Without it, all of them act.

        Raises:
          ValueError: as `render_chat` and `encode`.
        """
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "template": template,
        }
        if not plain:
            text = self.render_chat(messages, tools=tools, **options, **variables)
            return self.encode(text, special=False)
        control = self._control_tokens((self._template(template, tools),))
        messages, tools, variables = (
            control.mark(chat_template.plain_data(value)) for value in (messages, tools, variables)
        )
        text = self.render_chat(messages, tools=tools, **options, **variables)
        return self._encode_pieces(control.pieces(text))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; bytes that form no character come out as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_continuation(
        self, prompt: Sequence[int], ids: Sequence[int], *, skip_special: bool = True
    ) -> str:
        """The text that `ids` add after the tokens of `prompt`.

        `decode(ids)` would lose a leading space with decoders that strip it from the beginning of
        a text (Llama 2, Mistral).
        """
        stream = self.stream(prompt=prompt, skip_special=skip_special)
        return "".join([*(stream.push(token) for token in ids), stream.finish()])

    def stream(self, *, prompt: Sequence[int] = (), skip_special: bool = True) -> TextStream:
        """A decoder for tokens that arrive one at a time after the tokens of `prompt`."""
        return TextStream(
            functools.partial(self.decode, skip_special=skip_special),
            skipped=self.special_ids if skip_special else frozenset(),
            prompt=prompt,
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The chat as one text; encode it with special=False, or use `encode_chat`.

        Args:
          messages: {"role": ..., "content": ...} each.
          add_generation_prompt: end where the assistant's answer begins.
          continue_final_message: end within the last message, so that the model continues it;
            needs add_generation_prompt=False. A text names the field to continue.
          tools: JSON schemas of functions, for templates that know them.
          template: name of one of `chat_templates`; None takes "tool_use" when tools are given
            and it exists, else "default".
          variables: further names the template may read, such as enable_thinking.

        Raises:
          ValueError: when there is no such template, or it fails on these messages.
        """
        return chat_template.render(
            self._template(template, tools),
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={"documents": None, **self.special_tokens, **variables, "tools": tools},
        )

    def _template(self, name: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """The source of a chat template."""
        if name is None:
            named = tools is not None and "tool_use" in self.chat_templates
            name = "tool_use" if named else "default"
        if name not in self.chat_templates:
            known = ", ".join(sorted(self.chat_templates)) or "none"
            raise ValueError(f"the tokenizer has no chat template {name!r} (it has: {known})")
        return self.chat_templates[name]

    def _control_tokens(self, templates: tuple[str, ...]) -> ControlTokens:
        """Special tokens, and the added tokens that the text of the templates names."""
        if templates not in self._control_tokens_of:
            written = "\0".join(map(chat_template.literal_text, templates))
            added = self.backend.get_added_tokens_decoder().values()
            tokens = frozenset(
                token.content
                for token in added
                if token.special or (token.content in written and not token.content.isspace())
            )
            self._control_tokens_of[templates] = ControlTokens(tokens)
        return self._control_tokens_of[templates]

    @functools.cached_property
    def _control_tokens_of(self) -> dict[tuple[str, ...], ControlTokens]:
        return {}

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A second backend, for which no control token is more than its characters.

        Whether they act is a setting of the backend, and other threads encode at the same time.
        """
        content = json.loads(self.backend.to_str())
        control = self._control_tokens(tuple(self.chat_templates.values())).tokens
        for token in content["added_tokens"]:
            token["special"] = token["special"] or token["content"] in control
        with _package_errors("the tokenizer cannot be copied"):
            backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        """Ids of all control tokens but the one that stands for unknown characters."""
        tokens = self._control_tokens(tuple(self.chat_templates.values())).tokens
        ids = {self.backend.token_to_id(token) for token in tokens - {self._unknown}}
        return frozenset(token for token in ids if token is not None)

    @property
    def _unknown(self) -> str | None:
        return getattr(self.backend.model, "unk_token", None)

    def _has_control(self, text: str, row: tokenizers.Encoding) -> bool:
        """Whether a control token acts in a text that was encoded as usual."""
        unknown = self._unknown
        return bool(self._control_ids_of(row)) or (unknown is not None and unknown in text)

    def _control_ids_of(self, row: tokenizers.Encoding) -> set[int]:
        """The control tokens in a text, without those that the tokenizer puts around it."""
        return {
            token
            for token, added in zip(row.ids, row.special_tokens_mask, strict=True)
            if not added and token in self._control_ids
        }

    def _encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Token ids of the parts of one text, each with whether it is to be plain."""
        ids: list[int] = []
        for place, (text, plain) in enumerate(pieces):
            if place == 0 and not plain:
                ids += self.encode(text, special=False)
            else:
                ids += self.encode_behind(text, plain=plain)
        return ids


def _encode(
    backend: tokenizers.Tokenizer, texts: Sequence[str], special: bool
) -> list[tokenizers.Encoding]:
    """Encodings without offsets; the batch call lets other threads run, unlike the single one."""
    with _package_errors("the text cannot be tokenized"):
        return backend.encode_batch_fast(list(texts), add_special_tokens=special)
