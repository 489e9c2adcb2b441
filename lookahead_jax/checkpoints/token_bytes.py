"""The bytes that each token stands for, also where they are only a part of a character."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def bytes_of_tokens(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """A function from a token, as the vocabulary writes it, to the bytes of its text.

    It follows the decoder of the tokenizer: byte-level ones (GPT-2) write every byte as one
    character; those of SentencePiece write a space as U+2581, and some bytes as <0x0A>. What a
    decoder does to a whole text, such as stripping its first space, is left out.
    """
    steps = _steps(backend)
    if any(step["type"] == "ByteLevel" for step in steps):
        return _of_byte_level
    replaced = dict(filter(None, map(_replacement, steps)))
    fallback = any(step["type"] == "ByteFallback" for step in steps)

    def of_pieces(token: str) -> bytes:
        if fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for pattern, content in replaced.items():
            token = token.replace(pattern, content)
        return token.encode()

    return of_pieces


def _steps(backend: tokenizers.Tokenizer) -> list[Mapping[str, Any]]:
    """The settings of the decoders that the tokenizer applies one after the other."""
    if backend.decoder is None:
        return []
    whole = json.loads(backend.decoder.__getstate__())
    return whole["decoders"] if whole["type"] == "Sequence" else [whole]


def _replacement(step: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a decoder replaces in every token, and by what."""
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return step["pattern"]["String"], step["content"]
    return None


def _alphabet() -> dict[str, int]:
    """Character -> the byte that it stands for (Radford et al. 2019, GPT-2).

    Visible characters of Latin-1 stand for themselves, the characters from U+0100 for the others.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }


_BYTES = _alphabet()


def _of_byte_level(token: str) -> bytes:
    # Added tokens may have characters outside the alphabet: they stand for themselves.
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()
