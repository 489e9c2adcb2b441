"""Text that every machine has: documentation and code of Python and of installed packages.

What evaluations use stays out: files of the held-out code, and a tenth of all documents, which
`read_material(held_out=True)` gives to evaluations on text of this kind.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lookahead_jax.eval.tasks.own.code import HELDOUT

PACKAGES = (
    "absl", "anyio", "click", "datasets", "dateutil", "etils", "filelock", "flax", "fsspec",
    "httpx", "huggingface_hub", "idna", "jax", "jinja2", "markdown_it", "ml_dtypes", "multiprocess",
    "numpy", "opt_einsum", "optax", "orbax", "packaging", "pandas", "pyarrow", "requests", "rich",
    "safetensors", "scipy", "tqdm", "tyro", "urllib3", "yaml",
)  # fmt: skip
LIBRARY_BYTES = 6_000_000  # of the sources of the standard library
_PACKAGE_BYTES = 500_000  # of those of one package
_FILE_BYTES = (1_000, 120_000)
_PARAGRAPH = 60  # characters of the shortest documentation that is used
_LINE = 30  # shorter lines say nothing about where a file is from
_COPIED = 0.05  # share of held-out lines from which on a file is a copy


class SourceDocument(NamedTuple):
    """A text and where it is from."""

    name: str
    text: str


class Material(NamedTuple):
    """Documents by kind, each list in an order of its own that does not depend on the machine."""

    prose: list[SourceDocument]
    code: list[SourceDocument]

    def excerpt(self, rng: random.Random, size: int, kind: str) -> str:
        """About `size` characters of whole lines, out of one or more documents of a kind."""
        documents = self.prose if kind == "prose" else self.code
        pieces: list[str] = []
        while (left := size - sum(map(len, pieces))) > 0:
            text = rng.choice(documents).text
            start = rng.randrange(max(1, len(text) - left // 2))
            start = text.rfind("\n", 0, start) + 1
            end = text.find("\n", min(len(text), start + left))
            if piece := text[start : end if end >= 0 else None].strip("\n")[: 2 * left]:
                pieces.append(piece)
        return "\n\n".join(pieces)


def read_material(sources: Sequence[dict[str, Any]] = (), *, held_out: bool = False) -> Material:
    """The documents of this machine and the texts of source rows.

    A tenth of the documents, by their names, is held out from training.
    """
    copied = _held_out_lines()

    def kept(document: SourceDocument) -> bool:
        digest = hashlib.sha256(document.name.encode()).digest()[0]
        return (digest < 26) == held_out and not _is_copy(document.text, copied)

    code = [document for document in _sources() if kept(document)]
    prose = [*_topics(), *_descriptions(), *_docstrings(code), *_rows(sources)]
    return Material([document for document in prose if kept(document)], code)


def _held_out_lines() -> frozenset[str]:
    texts = [json.loads(line)["text"] for line in HELDOUT.read_text("utf-8").splitlines()]
    return frozenset(line for text in texts for line in _long_lines(text))


def _long_lines(text: str) -> list[str]:
    return [line for raw in text.splitlines() if len(line := raw.strip()) >= _LINE]


def _is_copy(text: str, lines: frozenset[str]) -> bool:
    own = _long_lines(text)
    return sum(line in lines for line in own) > _COPIED * len(own)


def _sources() -> Iterator[SourceDocument]:
    """Python files of the standard library and of packages, a limited amount of each."""
    library = Path(sysconfig.get_path("stdlib"))
    yield from _files(library, "python", LIBRARY_BYTES)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from _files(Path(folder), package, _PACKAGE_BYTES)


def _files(folder: Path, name: str, most: int) -> Iterator[SourceDocument]:
    paths = [
        path
        for path in folder.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests"}
        & set(path.parts[len(folder.parts) :])
    ]
    # A random order, the same everywhere: the first files would be those of a few folders.
    paths.sort(key=lambda path: hashlib.sha256(str(path.relative_to(folder)).encode()).digest())
    for path in paths:
        if not _FILE_BYTES[0] <= (size := path.stat().st_size) <= _FILE_BYTES[1]:
            continue
        if (most := most - size) < 0:
            return
        try:
            yield SourceDocument(f"{name}/{path.relative_to(folder)}", path.read_text("utf-8"))
        except UnicodeDecodeError:  # a file in another encoding
            continue


def _topics() -> Iterator[SourceDocument]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield SourceDocument(f"topic/{name}", text)


def _descriptions() -> Iterator[SourceDocument]:
    """Descriptions and licences of the packages."""
    for name in PACKAGES:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        metadata: Any = distribution.metadata  # its type has no `get` before Python 3.12
        text = metadata.get("Description") or ""
        if len(text) >= _FILE_BYTES[0]:
            yield SourceDocument(f"description/{name}", text)
        for file in distribution.files or ():
            if re.match(r"(LICENSE|COPYING|NOTICE)", file.name) and file.suffix != ".py":
                text = Path(str(file.locate())).read_text("utf-8", errors="replace")
                yield SourceDocument(f"licence/{name}/{file.name}", text[: _FILE_BYTES[1]])


def _docstrings(code: Sequence[SourceDocument]) -> Iterator[SourceDocument]:
    """The documentation inside of each file, one after the other."""
    for document in code:
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in old sources
                tree = ast.parse(document.text)
        except SyntaxError:
            continue
        texts = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ]
        text = "\n\n".join(text for text in texts if text and len(text) >= _PARAGRAPH)
        if len(text) >= _FILE_BYTES[0]:
            yield SourceDocument(f"docstrings/{document.name}", text)


def _rows(rows: Sequence[dict[str, Any]]) -> Iterator[SourceDocument]:
    """The texts of source rows: `text`, `prompt`, or the contents of `messages`."""
    for number, row in enumerate(rows):
        text = row.get("text") or row.get("prompt")
        if row.get("messages"):
            text = "\n\n".join(str(message.get("content") or "") for message in row["messages"])
        if not isinstance(text, str):
            raise ValueError(
                f"source row {number}: expected text, prompt or messages, got {', '.join(row)}"
            )
        digest = hashlib.sha256(text.encode()).hexdigest()
        yield SourceDocument(f"source/{digest}", text)
