"""Imports go one way, leave top-level names alone, and cost nothing until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lookahead_jax"

# Lower layers first; a module imports its own layer and those above it in this list.
LAYERS = [
    {"kernels"},
    {"program"},
    {"config", "files", "hf_config", "hf_defaults", "hf_files"},
    {"params", "sharding", "rope", "tokenizer"},
    {"layers", "cache", "cache_files", "checkpoint"},
    {"model"},
    {"observe", "policies", "tree", "lookahead", "sampling"},
    {"prompt", "sparse", "prefill", "batching", "streaming", "drafters", "acceptance"},
    {"decode_eviction"},
    {"decoding", "controller"},
    {"drafting"},
    {"reading", "replay", "kv_prediction"},
    {"generation", "scoring", "requests", "prompt_store", "openings", "rows", "engine"},
    {"speculation"},
    {"inspect", "server"},
    {"commands"},
    {"cli", "lm_eval", "train", "eval"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
MODULES += [PACKAGE / "policies" / "__init__.py", PACKAGE / "commands" / "__init__.py"]
for folder in ("kernels", "train", "eval"):  # rglob does not follow links
    MODULES += sorted((PACKAGE / folder).rglob("*.py"))


def room(path: Path) -> str:
    """The part of the package a file belongs to: its folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, int]]:
    """Absolute names that a file imports anywhere, function bodies included, and their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def back_edges(path: Path) -> list[str]:
    """Imports of `path` that go up the layers, or (in kernels/) to anything of ours."""
    here = room(path)
    wrong = []
    for name, line in imported(path):
        parts = name.split(".")
        if parts[0] != "lookahead_jax" or len(parts) == 1:
            continue
        there = parts[1]
        if there not in RANK:  # a public name, as in `from lookahead_jax import generate`
            there = "generation"
        if RANK[there] > RANK[here]:
            wrong.append(f"{here}, line {line}: imports {name}")
    return wrong


def test_imports_go_one_way():
    homeless = {room(path) for path in MODULES} - set(RANK)
    assert not homeless, "give these a place in LAYERS"
    assert [edge for path in MODULES for edge in back_edges(path)] == []


def test_no_import_of_top_level_rooms():
    rooms = {"kernels", "train", "eval"}
    wrong = [
        (room(p), line) for p in MODULES for n, line in imported(p) if n.split(".")[0] in rooms
    ]
    assert wrong == []


def test_a_back_edge_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    wrong = tmp_path / "cache.py"
    wrong.write_text("def f():\n    from lookahead_jax.prefill import prefill\n")
    assert back_edges(wrong) == ["cache, line 2: imports lookahead_jax.prefill.prefill"]
    kernel = tmp_path / "kernels" / "importance.py"
    kernel.parent.mkdir()
    kernel.write_text("import lookahead_jax.config\n")
    assert back_edges(kernel) != []


def test_importing_the_package_is_instant():
    code = "import sys, lookahead_jax, lookahead_jax.cli; print(*sys.modules)"
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


def test_public_names_outlive_the_import_of_their_modules():
    import lookahead_jax.prefill  # a submodule with the name of a public function

    assert callable(lookahead_jax.prefill)
    assert lookahead_jax.prefill.__name__ == "prefill"
    assert lookahead_jax.policies.make_policy is lookahead_jax.make_policy
