"""Tokens that a directory declares outside tokenizer.json, added as transformers 5.24 adds them.

tokenizer_config.json, special_tokens_map.json and added_tokens.json may name tokens (roles such as
`bos_token`, lists, a table of ids) that tokenizer.json lacks, or whose flags differ there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lookahead_jax.checkpoints.hf_files import read_json

# In the order in which new tokens get their ids; further roles follow.
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_declared_tokens(
    backend: tokenizers.Tokenizer, directory: Path, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Adds the tokens that the directory declares to the backend.

    Args:
      settings: the content of tokenizer_config.json.

    Returns:
      Role ("bos_token", "eos_token", ...) -> token.

    Raises:
      ValueError: when a declaration is malformed, or names an id that the token cannot have.
    """
    where = str(directory)
    settings = dict(settings)
    extra = next((settings[name] for name in _LISTS if settings.get(name)), [])
    table: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        for index, fields in _mapping(settings["added_tokens_decoder"], where).items():
            table[_index(index, where)] = _token(fields, where)
    else:  # directories of older versions
        declared = read_json(directory, "special_tokens_map.json") or {}
        more = declared.get("extra_special_tokens", [])
        if isinstance(more, list) and isinstance(extra, list):
            extra = extra + more
        extra = extra or declared.get("additional_special_tokens") or []
        settings |= {name: value for name, value in declared.items() if name not in _LISTS}
    if not isinstance(extra, list | Mapping):
        raise ValueError(f"{where}: extra_special_tokens must be a list or named tokens")
    roles = _roles(settings, extra, where)
    listed = extra if isinstance(extra, list) else []
    extra = [_token(token, where, special=True) for token in listed]
    if "added_tokens_decoder" not in settings:
        special = {token.content for token in (*roles.values(), *extra)}
        for content, index in (read_json(directory, "added_tokens.json") or {}).items():
            is_special = content in special
            table[_index(index, where)] = AddedToken(
                content, normalized=not is_special, special=is_special
            )
    _add(backend, table, roles, extra)
    for index, token in table.items():
        if (actual := backend.token_to_id(token.content)) != index:
            raise ValueError(
                f"{where}: {token.content!r} is declared as token {index}, but tokenizer.json has "
                f"it as {actual}; the files must come from one tokenizer"
            )
    return {role: token.content for role, token in roles.items()}


def _add(
    backend: tokenizers.Tokenizer,
    table: Mapping[int, AddedToken],
    roles: Mapping[str, AddedToken],
    extra: list[AddedToken],
) -> None:
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    new: dict[str, AddedToken] = {}
    for _, token in sorted(table.items()):
        if token.content not in present or _flags(token) != _flags(present[token.content]):
            new[token.content] = token
    named = {token.content for token in roles.values()}
    for token in (*roles.values(), *extra):
        if token.content not in present and token.content not in new:
            new[token.content] = token
    for content, token in new.items():
        if content in named:
            token.special = True
    backend.add_tokens(list(new.values()))


def _roles(settings: Mapping[str, Any], extra: Any, where: str) -> dict[str, AddedToken]:
    """The tokens that have a role, in the order in which they are added."""
    named = {name: settings[name] for name in _ROLES if settings.get(name) is not None}
    for name, value in settings.items():
        if name.endswith("_token") and name not in _ROLES and isinstance(value, str | Mapping):
            named[name] = value
    if isinstance(extra, Mapping):
        named |= extra
    return {name: _token(value, where, special=True) for name, value in named.items()}


def _token(value: Any, where: str, *, special: bool = False) -> AddedToken:
    """A token written as text, or as an object with its flags."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=special)
    fields = value if isinstance(value, Mapping) else {}
    content = fields.get("content")
    if not isinstance(content, str) or not content:
        raise ValueError(f"{where}: {value!r} is not a token: it needs a `content`")
    flags = {name: fields[name] for name in _FLAGS if fields.get(name) is not None}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{where}: the flags of token {content!r} must be true or false")
    return AddedToken(content, **(flags | ({"special": True} if special else {})))


def _flags(token: AddedToken) -> tuple[bool, ...]:
    return tuple(getattr(token, name) for name in _FLAGS)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: added_tokens_decoder must map ids to tokens")
    return value


def _index(value: Any, where: str) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        return int(value)
    if type(value) is int and 0 <= value < 2**31:
        return value
    raise ValueError(f"{where}: {value!r} is not the id of a token")
