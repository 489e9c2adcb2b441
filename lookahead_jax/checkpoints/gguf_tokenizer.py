"""The tokenizer in the metadata of a GGUF file, built with the `tokenizers` package."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lookahead_jax.checkpoints.tokenizer import Tokenizer

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = (_UNKNOWN, _CONTROL)

# How each `tokenizer.ggml.pre` splits a text before byte-level BPE.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# OpenAI's o200k: words begin anew where capitals do; contractions belong to their word.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace(_ENDING, "").replace(r"\p{N}{1,3}", r"\p{N}")
_PATTERNS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _GPT4O,  # gpt-oss
    "tekken": _TEKKEN,  # Mistral since Nemo
    "smollm": _GPT2,
    "dbrx": _LLAMA3,  # OLMo 2
    "smaug-bpe": _LLAMA3,  # SmolLM3
    "refact": _GPT2,  # Granite
    "glm4": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
}
_SINGLE_DIGITS = {"smollm", "refact"}  # digits are split off one by one first
# A word of the vocabulary is never merged from parts.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken", "glm4", "chatglm-bpe"}
# BOS is added unless the file says otherwise; of other files, if it says so.
_WITH_BOS = {"llama-bpe", "llama3", "llama-v3", "tekken"}
_ROLES = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}
_SPACE = "\u2581"  # how SentencePiece writes a space


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file.

    Raises:
      ValueError: naming the key, for an unknown model or pre-tokenizer, and for lists that do
        not belong together.
    """
    g = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    tokens = g.get("tokens")
    if not isinstance(tokens, list) or not tokens or len(set(tokens)) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens must be a list of different texts")
    kinds = np.asarray(g.get("token_type", np.full(len(tokens), _NORMAL)))
    if kinds.shape != (len(tokens),):
        raise ValueError(f"tokenizer.ggml.token_type must have {len(tokens)} entries")
    match g.get("model"):
        case "gpt2":
            backend = _byte_level(g, tokens)
        case "llama":
            backend = _sentencepiece(g, tokens, kinds)
        case other:
            raise ValueError(f"unknown tokenizer.ggml.model {other!r}; known: gpt2, llama")
    roles = {role: _token(g, key, tokens) for key, role in _ROLES.items() if key in g}
    # As in llama.cpp and Hugging Face folders, a token with a role is special, whatever its type.
    special = set(roles.values()) | {tokens[i] for i in np.flatnonzero(np.isin(kinds, _SPECIAL))}
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=token in special, normalized=False)
            for token, kind in zip(tokens, kinds.tolist(), strict=True)
            if token in special or kind == _USER_DEFINED
        ]
    )
    _add_around(backend, g, roles)
    templates = {
        "default" if name == "tokenizer.chat_template" else name.rpartition(".")[2]: value
        for name, value in metadata.items()
        if name.startswith("tokenizer.chat_template") and isinstance(value, str)
    }
    return Tokenizer(backend=backend, special_tokens=roles, chat_templates=templates)


def eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end a text: those that the file names as end of text, turn or message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def _token(g: Mapping[str, Any], key: str, tokens: Sequence[str]) -> str:
    number = g[key]
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise ValueError(f"tokenizer.ggml.{key} {number} is not one of {len(tokens)} tokens")
    return tokens[number]


def _byte_level(g: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    """GPT-2's kind: texts are split by a pattern, then bytes are merged."""
    pre = g.get("pre", "default")
    if pre not in _PATTERNS:
        known = ", ".join(_PATTERNS)
        raise ValueError(f"unknown tokenizer.ggml.pre {pre!r}; known: {known}")
    merges = [tuple(merge.split(" ")) for merge in g.get("merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary, merges=_checked(merges, vocabulary), ignore_merges=pre in _WHOLE_WORDS
    )
    backend = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[pre]), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pre in _SINGLE_DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if _PATTERNS[pre] == _QWEN2:
        backend.normalizer = normalizers.NFC()
    return backend


def _checked(merges: list[tuple[str, ...]], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges of two tokens into a third; ValueError names the first that is none."""
    pairs = []
    for merge in merges:
        if len(merge) != 2 or any(part not in vocabulary for part in (*merge, "".join(merge))):
            raise ValueError(f"tokenizer.ggml.merges: {' '.join(merge)!r} does not merge tokens")
        pairs.append((merge[0], merge[1]))
    return pairs


def _sentencepiece(
    g: Mapping[str, Any], tokens: list[str], kinds: np.ndarray
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: the best-scored pair of tokens that form a token is merged first."""
    scores = np.asarray(g.get("scores", ()))
    if scores.shape != (len(tokens),):
        raise ValueError(f"tokenizer.ggml.scores must have {len(tokens)} entries")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for token, kind, score in zip(tokens, kinds.tolist(), scores.tolist(), strict=True):
        if kind in (_NORMAL, _USER_DEFINED, _UNUSED):
            for at in range(1, len(token)):
                left, right = vocabulary.get(token[:at]), vocabulary.get(token[at:])
                if left is not None and right is not None:
                    pairs.append((-score, left, right))
    model = models.BPE(
        vocab=vocabulary,
        merges=[(tokens[left], tokens[right]) for _, left, right in sorted(pairs)],
        unk_token=_token(g, "unknown_token_id", tokens) if "unknown_token_id" in g else None,
        fuse_unk=True,
        byte_fallback=bool((kinds == _BYTE).any()),
    )
    backend = tokenizers.Tokenizer(model)
    prefix = g.get("add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _add_around(
    backend: tokenizers.Tokenizer, g: Mapping[str, Any], roles: Mapping[str, str]
) -> None:
    """BOS and EOS around a text, where the file says so or its kind implies it (_WITH_BOS)."""
    implied = g.get("model") == "llama" or g.get("pre") in _WITH_BOS
    bos = g.get("add_bos_token", implied) and roles.get("bos_token")
    eos = g.get("add_eos_token", False) and roles.get("eos_token")
    around = [token for token in (bos, eos) if token]
    if around:
        template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        ids = [(token, backend.token_to_id(token)) for token in around]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
