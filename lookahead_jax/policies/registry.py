"""Eviction policies by name: `make_policy` builds one."""

import dataclasses
import typing
from typing import Any, Literal

from lookahead_jax.policies.ada import Ada
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.blockwise import Blockwise
from lookahead_jax.policies.chunkkv import ChunkKV
from lookahead_jax.policies.critical import Critical
from lookahead_jax.policies.expected_attention import ExpectedAttention
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.h2o import H2O
from lookahead_jax.policies.keydiff import KeyDiff
from lookahead_jax.policies.knorm import KNorm
from lookahead_jax.policies.kvzap import KVzap
from lookahead_jax.policies.kvzip import KVzip, KVzipPlus
from lookahead_jax.policies.lagkv import LagKV
from lookahead_jax.policies.laq import LAQ, LAQPlusPlus
from lookahead_jax.policies.layers import Layers
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.policies.oracle import Oracle
from lookahead_jax.policies.pyramidkv import PyramidKV
from lookahead_jax.policies.qfilter import QFilter
from lookahead_jax.policies.random import Random
from lookahead_jax.policies.rerotate import Rerotate
from lookahead_jax.policies.rkv import RKV
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.policies.speckv import SpecKV
from lookahead_jax.policies.streaming_llm import StreamingLLM
from lookahead_jax.policies.threshold import Threshold
from lookahead_jax.policies.tova import Tova
from lookahead_jax.policies.triattention import TriAttention
from lookahead_jax.policies.wrapper import PolicyWrapper

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "random": Random,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "tova": Tova,
    "snapkv": SnapKV,
    "rkv": RKV,
    "pyramidkv": PyramidKV,
    "ada": Ada,
    "critical": Critical,
    "chunkkv": ChunkKV,
    "layers": Layers,
    "threshold": Threshold,
    "blockwise": Blockwise,
    "rerotate": Rerotate,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "lagkv": LagKV,
    "qfilter": QFilter,
    "triattention": TriAttention,
    "expected_attention": ExpectedAttention,
    "laq": LAQ,
    "laq++": LAQPlusPlus,
    "speckv": SpecKV,
    "kvzip": KVzip,
    "kvzip+": KVzipPlus,
    "kvzap": KVzap,
    "lookaheadkv": LookaheadKV,
    "oracle": Oracle,
}


def policies_that_cut_while_decoding() -> list[str]:
    """Names of the policies that can evict while decoding, with their default settings."""
    defaults = (kind for kind in POLICIES.items() if not _needed(kind[1]))
    return [name for name, kind in defaults if kind().decode_cut is not None]


def _needed(kind: type[Policy]) -> list[str]:
    """The settings of a policy that have no default."""
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    ]


def make_policy(name: str, **arguments: Any) -> Policy:
    """The policy called `name` with its fields set from `arguments`.

    Values may be text, as on a command line (`window="16"`, `pool="none"`), or already parsed
    (None stands for "none"). `preset` names a set of fields, which other arguments override.

    A policy around another (`ada`, `critical`, `chunkkv`, `layers`, `threshold`, `blockwise`,
    `rerotate`) takes `inner`, the name of the policy it wraps (default snapkv), and passes on the
    arguments that it does not have itself. Names in one text, `critical:ada:keydiff`, are such
    policies around each other, outermost first.

    Raises ValueError, listing what is possible, for an unknown name, argument or value, and for a
    policy that cannot wrap the next.
    """
    _check_names(name)
    first, _, inner = name.partition(":")
    kind = POLICIES[first]
    if issubclass(kind, PolicyWrapper):
        return _make_wrapper(first, kind, arguments, inner or arguments.pop("inner", "snapkv"))
    fields = {}
    if "preset" in arguments and kind.presets:
        preset = str(arguments.pop("preset"))
        if preset not in kind.presets:
            raise ValueError(f"{name}: unknown preset={preset}; known: {', '.join(kind.presets)}")
        fields.update(kind.presets[preset])
    fields.update(_parse_fields(name, kind, arguments))
    if lacking := [field for field in _needed(kind) if field not in fields]:
        raise ValueError(f"{name} needs {' and '.join(lacking)}: give {lacking[0]}=...")
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_names(text: str) -> None:
    """Raises ValueError unless `text` names policies of which all but the last are wrappers."""
    names = text.split(":")
    wrappers = [known for known, kind in POLICIES.items() if issubclass(kind, PolicyWrapper)]
    for place, name in enumerate(names, start=1):
        if name not in POLICIES:
            where = "" if name == text else f" in {text!r}"
            raise ValueError(f"unknown policy {name!r}{where}; known: {', '.join(POLICIES)}")
        if place < len(names) and name not in wrappers:
            raise ValueError(
                f"policy {text!r}: {name} wraps no other policy, only {', '.join(wrappers)} do; "
                "settings are name=value"
            )


def _make_wrapper(
    name: str, kind: type[PolicyWrapper], arguments: dict[str, Any], inner: Any
) -> Policy:
    """A policy around `inner`, a policy or a name; `inner` gets the arguments of other names."""
    fields = [field.name for field in dataclasses.fields(kind) if field.name != "inner"]
    own = _parse_fields(name, kind, {k: v for k, v in arguments.items() if k in fields})
    rest = {k: v for k, v in arguments.items() if k not in fields}
    if not isinstance(inner, Policy):
        try:
            inner = make_policy(str(inner), **rest)
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
