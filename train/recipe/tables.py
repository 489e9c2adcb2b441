"""Prompts about tables: Markdown, CSV, JSON and lists of fields."""

import csv
import io
import json
import random

from lookahead_jax.train.recipe import words
from lookahead_jax.train.recipe.material import Material
from lookahead_jax.train.recipe.turns import ChatDraft, with_document

_COLUMNS = {
    "town": words.place, "price": words.price, "date": words.date, "code": words.code,
    "owner": words.person, "job": words.job, "colour": words.colour, "phone": words.phone,
    "count": words.amount, "start": words.clock, "version": words.version, "dish": words.dish,
    "number": words.digits,
}  # fmt: skip
_KEYS = {"name": words.person, "item": words.thing, "project": words.project, "site": words.site}
_CHARS_PER_CELL = 14


def table(rng: random.Random, size: int, material: Material) -> ChatDraft:
    """A table of about `size` characters and a question on a cell, a row, a column or a count."""
    key = rng.choice(list(_KEYS))
    columns = rng.sample(list(_COLUMNS), rng.randint(2, 5))
    count = max(3, size // (_CHARS_PER_CELL * (len(columns) + 1)))
    rows: dict[str, list[str]] = {}
    for _ in range(2 * count):  # keys may be drawn twice
        if len(rows) == count:
            break
        rows[_KEYS[key](rng)] = [_COLUMNS[column](rng) for column in columns]
    document = rng.choice((_markdown, _csv, _json, _fields))([key, *columns], rows)
    if rng.random() < 0.3:
        before, after = (material.excerpt(rng, max(60, size // 8), "prose") for _ in range(2))
        document = f"{before}\n\n{document}\n\n{after}"
    question, answers = _question(rng, key, columns, rows)
    return with_document(rng, document, question, answers)


def _question(
    rng: random.Random, key: str, columns: list[str], rows: dict[str, list[str]]
) -> tuple[str, list[str]]:
    name = rng.choice(list(rows))
    at = rng.randrange(len(columns))
    column, value = columns[at], rows[name][at]
    match rng.randrange(7):
        case 0 | 1:
            shapes = ("What is the {c} of {n}?", "Look up the {c} for {n}.", "{n}: which {c}?")
            return rng.choice(shapes).format(c=column, n=name), [value]
        case 2:
            return f"Which {key} has the {column} {value}?", [name]
        case 3:
            return f"Give the whole entry of {name}.", rows[name]
        case 4:
            names = rng.sample(list(rows), min(3, len(rows)))
            return f"List the {column} of " + ", ".join(names) + ".", [rows[n][at] for n in names]
        case 5:
            return f"How many entries have the {column} {value}? Name them.", [name]
    return f"List every {key} with its {column}.", [name, value]


def _markdown(header: list[str], rows: dict[str, list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _csv(header: list[str], rows: dict[str, list[str]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([header, *([name, *cells] for name, cells in rows.items())])
    return file.getvalue().strip()


def _json(header: list[str], rows: dict[str, list[str]]) -> str:
    entries = [dict(zip(header, [name, *cells], strict=True)) for name, cells in rows.items()]
    return "[\n" + ",\n".join("  " + json.dumps(entry) for entry in entries) + "\n]"


def _fields(header: list[str], rows: dict[str, list[str]]) -> str:
    def entry(cells: list[str]) -> str:
        return "\n".join(f"{name}: {cell}" for name, cell in zip(header, cells, strict=True))

    return "\n\n".join(entry([name, *cells]) for name, cells in rows.items())
