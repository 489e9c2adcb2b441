"""Distinguishes control tokens written by a chat template from those in messages.

The same rules as `apply_chat_template(..., sanitize_control_tokens=True)` of transformers 5.24,
and one more: a control token that is split over several strings is found as well.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Noncharacters of Unicode: text to be exchanged does not contain them. Messages lose theirs.
_START, _END, _SEAM = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED = re.compile(f"[{_START}{_END}{_SEAM}]")


class ControlTokens:
    """The control tokens of one tokenizer and chat template; finds and marks them in texts."""

    def __init__(self, tokens: frozenset[str]):
        self.tokens = tokens
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._longest_beginning = max(map(len, self._beginnings), default=0)
        joined = (token[0] + _SEAM + token[1:] for token in tokens if len(token) > 1)
        try:
            any_token = _pattern(tokens)
            self._any = re.compile(any_token)
            self._marked = re.compile(f"{_START}({any_token}){_END}|[{_START}{_END}]")
            self._joined = re.compile(_pattern(joined))
        except RecursionError as error:
            raise ValueError("too many control tokens are prefixes of one another") from error

    def mark(self, value: Any) -> Any:
        """The value (text, list or mapping) with marks around the control tokens in its texts.

        A text that ends with the beginning of a control token gets a mark there, in case the
        template puts the rest after it.
        """
        if isinstance(value, str):
            return self._mark_end(self._mark_whole(value))
        if isinstance(value, Mapping):
            return {self._mark_whole(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def _mark_whole(self, value: Any) -> Any:
        if not isinstance(value, str):  # keys may be anything
            return value
        return self._any.sub(f"{_START}\\g<0>{_END}", _RESERVED.sub("", value))

    def _mark_end(self, text: str) -> str:
        """The text with a seam inside the longest beginning of a control token at its end."""
        stripped = text.rstrip()  # templates may strip it too
        for length in range(min(self._longest_beginning, len(stripped)), 0, -1):
            if stripped[-length:] in self._beginnings:
                at = len(stripped) - length + 1
                return text[:at] + _SEAM + text[at:]
        return text

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """Parts of a text rendered from marked values, each with whether it is a marked token.

        Marks are removed. A mark that the template tore from its token, and a seam inside a
        control token, still separate two parts.
        """
        text = self._joined.sub(lambda token: token.group().replace(_SEAM, _END), text)
        parts = self._marked.split(text.replace(_SEAM, ""))
        # Splitting at a pattern with one group puts what the group matched at odd places.
        return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def _pattern(texts: Iterable[str]) -> str:
    """A regular expression for the longest of the texts, with no choice tried twice.

    Searching for `a|b|...` takes time for every alternative, and there may be hundreds.
    """
    tree: dict[str, dict] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}  # a text ends here
    return _subtree(tree) if tree else "(?!)"


def _subtree(node: dict[str, dict]) -> str:
    literal = ""
    while len(node) == 1 and "" not in node:
        ((character, node),) = node.items()
        literal += re.escape(character)
    branches = [re.escape(c) + _subtree(child) for c, child in node.items() if c]
    if not branches:
        return literal
    return f"{literal}(?:{'|'.join(branches)}){'?' if '' in node else ''}"
