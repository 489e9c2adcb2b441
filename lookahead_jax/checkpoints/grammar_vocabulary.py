"""A tokenizer's vocabulary in the form that llguidance matches grammars against."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def import_llguidance() -> Any:
    """The package; ValueError, with the remedy, where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            f"grammars need the package llguidance ({error}): pip install 'lookahead-jax[serve]'"
        ) from error
    return llguidance


class _Vocabulary:
    """The attributes that `llguidance.TokenizerWrapper` asks for."""

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Iterable[int], encode: Callable[..., list[int]]
    ):
        # One token more than there are: llguidance needs a token of its own for the end of a text.
        # Which of the real ones may end a row is decided for each row.
        self.tokens = [*tokens, b"<|end|>"]
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [*sorted(special_ids), len(tokens)]
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def grammar_vocabulary(
    tokens: Sequence[bytes], special_ids: Iterable[int], encode: Callable[[str], list[int]]
) -> Any:
    """An `LLTokenizer` of tokens by their bytes; the id len(tokens) is its end of a text.

    `encode` is how the model's own tokenizer spells a text: where a grammar leaves no choice,
    llguidance allows that spelling only.
    """
    llguidance = import_llguidance()
    wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokens, special_ids, encode))
    return llguidance.LLTokenizer(wrapped, n_vocab=len(tokens) + 1)
