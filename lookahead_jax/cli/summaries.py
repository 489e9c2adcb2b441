"""One sentence for each policy and drafter, for help texts.

The sentences are the first ones of the classes' docstrings. They are read from the sources:
importing the classes would import JAX, and help should appear at once.
"""

import ast
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def policy_summaries() -> dict[str, str]:
    """Name of each eviction policy -> what it does."""
    return _summaries(_PACKAGE / "policies" / "registry.py", "POLICIES")


def drafter_summaries() -> dict[str, str]:
    """Name of each drafter -> what it does."""
    return _summaries(_PACKAGE / "drafters" / "registry.py", "DRAFTERS")


def _summaries(registry: Path, table: str) -> dict[str, str]:
    """The names in a registry's table, each with the sentence of its class.

    The table's values are classes that the registry imports, their dotted names in the package, or
    calls whose last argument is the sentence.
    """
    tree = ast.parse(registry.read_text("utf-8"))
    modules = {
        alias.name: node.module.removeprefix("lookahead_jax.")
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    summaries = {}
    for key, value in zip(*_table(tree, table), strict=True):
        if isinstance(value, ast.Call):
            sentence = ast.literal_eval(value.args[-1])
        elif isinstance(value, ast.Name):
            sentence = _first_sentence(modules[value.id], value.id)
        else:
            module, _, name = ast.literal_eval(value).rpartition(".")
            sentence = _first_sentence(module, name)
        summaries[ast.literal_eval(key)] = sentence
    return summaries


def _table(tree: ast.Module, name: str) -> tuple[list[ast.expr], list[ast.expr]]:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and isinstance(value, ast.Dict):
            return [key for key in value.keys if key is not None], value.values
    raise ValueError(f"there is no table {name}")


def _first_sentence(module: str, name: str) -> str:
    path = _PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
            return " ".join(paragraph.split()).partition(". ")[0].rstrip(".") + "."
    raise ValueError(f"{path} has no class {name}")
