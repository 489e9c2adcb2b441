"""Imports go one way, leave top-level names alone, and cost nothing until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lookahead_jax"

# Lower packages first; a module imports its own package and those above it in this list.
PACKAGES = [
    "kernels",
    "host",
    "model",
    "checkpoints",
    "policies",
    "modules",
    "prefilling",
    "decoding",
    "drafters",
    "prompts",
    "generation",
    "strategies",
    "engine",
    "server",
    "eval",
    "train",
    "cli",
]
ENTRIES = {"__init__", "__main__", "lm_eval"}  # files beside the packages; they may import any
LINKED = ("kernels", "train", "eval")  # rglob does not follow links


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module below the package by its dotted name, packages by that of their folder."""
    files = [*package.rglob("*.py")]
    for folder in LINKED:
        if (package / folder).is_symlink():
            files += (package / folder).rglob("*.py")
    names = {}
    for file in files:
        parts = file.relative_to(package).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    return names


def imported(path: Path) -> list[tuple[str, str | None, int]]:
    """What a file imports anywhere, function bodies included: module, name in it, line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.module or "", alias.name, node.lineno) for alias in node.names]
    return found


def edges(names: dict[str, Path]) -> list[tuple[str, str, int]]:
    """Imports among the modules: importer, imported, line. Public names count as `__init__`."""
    found = []
    for here, path in names.items():
        for module, name, line in imported(path):
            if module.split(".")[0] != "lookahead_jax":
                continue
            there = module.removeprefix("lookahead_jax").removeprefix(".")
            if name is not None and (below := f"{there}.{name}".strip(".")) in names:
                there = below
            found.append((here, there or "__init__", line))
    return found


def back_edges(names: dict[str, Path]) -> list[str]:
    """Imports that go up the packages, or that name no module."""
    rank = {name: i for i, name in enumerate(PACKAGES)}
    public = rank["engine"]  # the highest package that __init__ exports from
    wrong = []
    for here, there, line in edges(names):
        own, other = here.split(".")[0], there.split(".")[0]
        if there != "__init__" and there not in names and there not in LINKED:
            wrong.append(f"{here}, line {line}: there is no module {there}")
        elif own in rank and rank.get(other, public if other == "__init__" else 99) > rank[own]:
            wrong.append(f"{here}, line {line}: imports {there}")
    return wrong


def circles(names: dict[str, Path]) -> list[str]:
    """One circle of imports for every module that is in one. `__init__` takes no part."""
    below: dict[str, set[str]] = {name: set() for name in names}
    for here, there, _ in edges(names):
        if "__init__" not in (here, there) and there in below:
            below[here].add(there)
    found, finished = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in finished:
            for other in sorted(below[name]):
                visit(other, (*path, name))
            finished.add(name)

    for name in below:
        visit(name, ())
    return found


def test_every_file_stands_in_a_package():
    loose = {name.split(".")[0] for name in modules()} - set(PACKAGES) - ENTRIES
    assert not loose, "move these into a package, or name their package in PACKAGES"
    missing = [name for name in PACKAGES if not (PACKAGE / name).is_dir()]
    assert not missing, "PACKAGES names folders that do not exist"


def test_every_package_says_what_it_is_for():
    """In one sentence. kernels/, train/ and eval/ have no __init__: see docs/architecture.md."""
    for name, path in modules().items():
        if path.name == "__init__.py" and name != "__init__":
            docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            assert docstring.endswith("."), name
            assert len(docstring.splitlines()) == 1, name


def test_imports_go_one_way():
    assert back_edges(modules()) == []


def test_no_circles():
    assert circles(modules()) == []


def test_no_import_of_top_level_packages():
    wrong = [
        (name, line)
        for name, path in modules().items()
        for module, _, line in imported(path)
        if module.split(".")[0] in LINKED
    ]
    assert wrong == []


def write(package: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, content in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return modules(package)


def test_a_back_edge_is_found(tmp_path):
    names = write(
        tmp_path,
        {
            "model/cache.py": "def f():\n    import lookahead_jax.prefilling.prefill\n",
            "prefilling/prefill.py": "from lookahead_jax.model.nowhere import x\n",
            "train/step.py": "import lookahead_jax.eval.nothing\n",
        },
    )
    assert back_edges(names) == [
        "model.cache, line 2: imports prefilling.prefill",
        "prefilling.prefill, line 1: there is no module model.nowhere",
        "train.step, line 1: there is no module eval.nothing",
    ]


def test_a_circle_inside_a_package_is_found(tmp_path):
    names = write(
        tmp_path,
        {
            "model/a.py": "from lookahead_jax.model import b\n",
            "model/b.py": "import lookahead_jax.model.a\n",
        },
    )
    assert circles(names) == ["model.a -> model.b -> model.a"]


def test_importing_the_package_is_instant():
    code = "import sys, lookahead_jax, lookahead_jax.cli.main; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(run.stdout.split())
    assert not loaded & {"jax", "flax", "datasets", "orbax", "transformers", "torch"}


def test_every_public_name_exists():
    import lookahead_jax

    for name in lookahead_jax.__all__:
        assert getattr(lookahead_jax, name) is not None, name
    assert set(lookahead_jax.__all__) <= set(dir(lookahead_jax))
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        lookahead_jax.nothing_of_ours  # noqa: B018


def test_policies_is_a_public_package():
    import lookahead_jax

    assert lookahead_jax.policies.make_policy is lookahead_jax.make_policy
