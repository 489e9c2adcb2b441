"""Where in a JSON schema an error is: llguidance says what is wrong, not where."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_SECONDS = 1.0  # for compiling sub-schemas to find the place
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")


def path_of_error(schema: Mapping[str, Any], message: str, fails: Callable[[str], Any]) -> str:
    """The path of the smallest sub-schema that alone fails with `message`, such as properties.a.

    `fails` compiles the text of a schema and returns its error message, or something else. Empty
    where the error belongs to the whole schema. The path is shorter if the search takes long.
    """
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    path: list[str] = []
    end = time.monotonic() + _SECONDS
    again = True
    while again:
        again = False
        for name, part in _parts(schema):
            if time.monotonic() > end:
                break
            if fails(json.dumps({**shared, **part})) == message:
                path, schema, again = [*path, name], part, True
                break
    return ".".join(path)


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas directly inside a schema, with their paths."""
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            inside = [(f"{key}.{name}", part) for name, part in value.items()]
        elif key in _LISTED and isinstance(value, list):
            inside = [(f"{key}.{i}", part) for i, part in enumerate(value)]
        else:
            inside = [(key, value)] if key in _SINGLE else []
        yield from ((name, part) for name, part in inside if isinstance(part, Mapping))
