"""Eviction policies by name: `make_policy` builds one."""

import dataclasses
import typing
from typing import Any, Literal

from lookahead_jax.policies.ada import Ada
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.expected_attention import ExpectedAttention
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.h2o import H2O
from lookahead_jax.policies.keydiff import KeyDiff
from lookahead_jax.policies.kvzip import KVzip
from lookahead_jax.policies.laq import LAQ, LAQPlusPlus
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.policies.oracle import Oracle
from lookahead_jax.policies.pyramidkv import PyramidKV
from lookahead_jax.policies.random import Random
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.speckv import SpecKV
from lookahead_jax.policies.streaming_llm import StreamingLLM
from lookahead_jax.policies.tova import Tova
from lookahead_jax.policies.wrapper import PolicyWrapper

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "random": Random,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "tova": Tova,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "ada": Ada,
    "keydiff": KeyDiff,
    "expected_attention": ExpectedAttention,
    "laq": LAQ,
    "laq++": LAQPlusPlus,
    "speckv": SpecKV,
    "kvzip": KVzip,
    "lookaheadkv": LookaheadKV,
    "oracle": Oracle,
}


def policies_that_cut_while_decoding() -> list[str]:
    """Names of the policies that can evict while decoding, with their default settings."""
    defaults = (kind for kind in POLICIES.items() if _has_defaults(kind[1]))
    return [name for name, kind in defaults if kind().decode_cut is not None]


def _has_defaults(kind: type[Policy]) -> bool:
    missing = dataclasses.MISSING
    return all(
        field.default is not missing or field.default_factory is not missing
        for field in dataclasses.fields(kind)
    )


def make_policy(name: str, **arguments: Any) -> Policy:
    """The policy called `name` with its fields set from `arguments`.

    Values may be text, as on a command line (`window="16"`, `pool="none"`), or already parsed
    (None stands for "none"). `preset` names a set of fields, which other arguments override. `ada`
    takes `inner`, the name of the policy it wraps, and passes on the arguments that it does not
    have itself. Raises ValueError, listing what is possible, for an unknown name, argument or
    value.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    kind = POLICIES[name]
    if issubclass(kind, PolicyWrapper):
        return _make_wrapper(name, kind, arguments)
    fields = {}
    if "preset" in arguments and kind.presets:
        preset = str(arguments.pop("preset"))
        if preset not in kind.presets:
            raise ValueError(f"{name}: unknown preset={preset}; known: {', '.join(kind.presets)}")
        fields.update(kind.presets[preset])
    fields.update(_parse_fields(name, kind, arguments))
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _make_wrapper(name: str, kind: type[PolicyWrapper], arguments: dict[str, Any]) -> Policy:
    """A policy around another; arguments that the outer one does not have go to the inner one."""
    fields = [field.name for field in dataclasses.fields(kind) if field.name != "inner"]
    own = _parse_fields(name, kind, {k: v for k, v in arguments.items() if k in fields})
    rest = {k: v for k, v in arguments.items() if k not in (*fields, "inner")}
    inner = arguments.get("inner", "snapkv")
    if not isinstance(inner, Policy):
        if inner not in POLICIES:
            raise ValueError(f"{name}: unknown inner={inner}; known: {', '.join(POLICIES)}")
        try:
            inner = make_policy(inner, **rest)
        except ValueError as error:
            known = ", ".join(["inner", *fields])
            raise ValueError(f"{name} ({known}, or an argument of inner): {error}") from None
    elif rest:
        raise ValueError(f"{name}: {', '.join(rest)} must be set on the inner policy itself")
    try:
        return kind(inner=inner, **own)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _parse_fields(name: str, kind: type[Policy], arguments: dict[str, Any]) -> dict[str, Any]:
    types = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    known = [*(["preset"] if kind.presets else []), *fields]
    parsed = {}
    for key, value in arguments.items():
        if key not in fields:
            listed = f"known: {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"{name}: unknown argument {key!r}; {listed}")
        parsed[key] = _parse_value(name, key, types[key], value)
    return parsed


def _parse_value(name: str, key: str, kind: Any, value: Any) -> Any:
    text = str(value).strip()
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if text.lower() in choices:
            return text.lower()
        raise ValueError(f"{name}: {key}={text} is not possible; choose {', '.join(choices)}")
    if kind not in (int, float):
        return value
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "an integer", float: "a number"}[kind]
        raise ValueError(f"{name}: {key}={text} is not {wanted}") from None
