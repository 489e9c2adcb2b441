"""One sentence for each policy, for help texts.

The sentences are the first ones of the classes' docstrings. They are read from the sources:
importing the classes would import JAX, and help should appear at once.
"""

import ast
from pathlib import Path

_POLICIES = Path(__file__).parent.parent / "policies"


def policy_summaries() -> dict[str, str]:
    """Name of each eviction policy -> what it does."""
    tree = ast.parse((_POLICIES / "registry.py").read_text("utf-8"))
    files = {
        alias.name: node.module.rpartition(".")[2]
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    return {
        ast.literal_eval(key): _first_sentence(_POLICIES / f"{files[value.id]}.py", value.id)
        for key, value in _table(tree)
    }


def _table(tree: ast.Module) -> list[tuple[ast.expr, ast.Name]]:
    """Keys and classes of the registry's table POLICIES."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "POLICIES":
            if not isinstance(node.value, ast.Dict):
                break
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return [(key, kind) for key, kind in pairs if key and isinstance(kind, ast.Name)]
    raise ValueError("policies/registry.py has no table POLICIES")


def _first_sentence(path: Path, name: str) -> str:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
            return " ".join(paragraph.split()).partition(". ")[0].rstrip(".") + "."
    raise ValueError(f"{path} has no class {name}")
