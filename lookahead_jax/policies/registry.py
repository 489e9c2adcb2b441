"""Eviction policies: which prompt entries are kept. `make_policy` builds one from its name."""

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


def make_policy(name: str, **arguments: Any) -> Policy:
    """The policy called `name` with its fields set from `arguments`.

    Values may be text, as on a command line (`window="16"`, `pool="none"`), or already parsed
    (None stands for "none"). `preset` names a set of fields, which others override. `ada` takes
    `inner`, the name of the policy it wraps, and hands that one the arguments it does not know.
    Raises ValueError, listing what is possible, for an unknown name, argument or value.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    kind = POLICIES[name]
    if kind is Ada:
        return _make_ada(arguments)
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


def _make_ada(arguments: dict[str, Any]) -> Ada:
    own = _parse_fields("ada", Ada, {k: v for k, v in arguments.items() if k == "alpha"})
    inner = arguments.get("inner", "snapkv")
    rest = {k: v for k, v in arguments.items() if k not in ("alpha", "inner")}
    wrappable = [name for name in POLICIES if name not in ("ada", "full", "speckv", "kvzip")]
    if not isinstance(inner, Policy):
        if inner not in wrappable:
            known = ", ".join(wrappable)
            raise ValueError(f"ada: inner={inner} is not a policy it wraps; known: {known}")
        try:
            inner = make_policy(inner, **rest)
        except ValueError as error:
            raise ValueError(f"ada (inner, alpha, or an argument of inner): {error}") from None
    elif rest:
        raise ValueError(f"ada: {', '.join(rest)} must be set on the inner policy itself")
    try:
        return Ada(inner=inner, **own)
    except ValueError as error:
        raise ValueError(f"ada: {error}") from None


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
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "an integer", float: "a number"}[kind]
        raise ValueError(f"{name}: {key}={text} is not {wanted}") from None
