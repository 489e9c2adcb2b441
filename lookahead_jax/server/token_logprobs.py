"""Log-probabilities in the two forms of OpenAI's API."""

import itertools
from collections.abc import Sequence
from typing import Any

from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.logprobs import Logprobs


def chat_logprobs(
    tokens: Sequence[int], logprobs: Logprobs, tokenizer: Tokenizer
) -> dict[str, Any]:
    """`logprobs` of a chat's choice: one entry for each of its tokens."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        content = tokenizer.token_bytes(token)
        return {
            "token": _written(content),
            "logprob": logprob,
            "bytes": None if content is None else list(content),
        }

    entries = [
        entry(token, chosen) | {"top_logprobs": list(itertools.starmap(entry, top))}
        for token, chosen, top in _rows(tokens, logprobs)
    ]
    return {"content": entries, "refusal": None}


def completion_logprobs(
    tokens: Sequence[int], offsets: Sequence[int], logprobs: Logprobs, tokenizer: Tokenizer
) -> dict[str, Any]:
    """`logprobs` of a completion's choice; `offsets` say where in its text each token begins.

    As OpenAI's, the alternatives of a token include the token itself.
    """

    def name(token: int) -> str:
        return _written(tokenizer.token_bytes(token), prefix="bytes:")

    rows = list(_rows(tokens, logprobs))
    alternatives = []
    for token, chosen, top in rows:
        named: dict[str, float] = {}
        for other, logprob in [*top, (token, chosen)]:
            named.setdefault(name(other), logprob)  # of two tokens with one text, the likelier
        alternatives.append(named)
    return {
        "tokens": [name(token) for token in tokens],
        "token_logprobs": [chosen for _, chosen, _ in rows],
        "top_logprobs": alternatives,
        "text_offset": list(offsets),
    }


def _rows(tokens: Sequence[int], logprobs: Logprobs):
    """(token, its log-probability, [(alternative, its log-probability), ...]) of each token."""
    alternatives = zip(logprobs.top_ids.tolist(), logprobs.top.tolist(), strict=True)
    for token, chosen, (ids, values) in zip(
        tokens, logprobs.chosen.tolist(), alternatives, strict=True
    ):
        yield token, chosen, list(zip(ids, values, strict=True))


def _written(content: bytes | None, prefix: str = "") -> str:
    """A token as text; as OpenAI's, one that is only a part of a character as \\x escapes."""
    try:
        return (content or b"").decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in content or b"")
