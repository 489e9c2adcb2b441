"""The examples of docs/ run as they stand, paths exist, and the API page leaves nothing out."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.drafters.registry import DRAFTERS
from lookahead_jax.eval.tasks.registry import TASKS
from lookahead_jax.policies.registry import POLICIES
from lookahead_jax.strategies.registry import STRATEGIES
from tests.test_imports import PACKAGES

ROOT = Path(__file__).parent.parent


def run_example(page, monkeypatch):
    """Runs the page's Python; the names it has made."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.S | re.M)
    assert blocks, page
    for block in blocks:
        code = [line for line in block.splitlines() if line.strip()]
        assert len(code) < 40, "an example of under 40 lines"
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile("\n".join(blocks), page, "exec"), names)
    return names


@pytest.mark.slow
def test_tutorial(monkeypatch, capsys):
    names = run_example("tutorial.md", monkeypatch)
    assert names["result"].cache.bytes < names["result"].cache.full_bytes
    assert names["drafted"].drafting.mean_accepted > 1
    assert len(capsys.readouterr().out.split()) > 20


def test_add_a_policy(monkeypatch):
    monkeypatch.setattr("lookahead_jax.policies.POLICIES", POLICIES.copy())
    result = run_example("add-a-policy.md", monkeypatch)["result"]
    length = result.prompt_tokens[0]
    assert result.kept.shape[-1] == 32
    assert (result.kept[..., -8:] == np.arange(length - 8, length)).all()
    assert (result.kept[..., 0] < length - 32).any(), "not only the last ones"
    POLICIES.pop("vnorm", None)


@pytest.mark.slow
def test_strategies(monkeypatch):
    names = run_example("strategies.md", monkeypatch)
    assert all(work.tokens <= 90 for work in names["result"].work)
    assert len(names["longest"].tokens[0]) == 16


@pytest.mark.slow
def test_add_a_drafter(monkeypatch):
    names = run_example("add-a-drafter.md", monkeypatch)
    assert names["drafted"].tokens == names["plain"].tokens
    assert names["drafted"].drafting.mean_accepted > 1.2


@pytest.mark.slow
def test_add_a_task(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows = run_example("add-a-task.md", monkeypatch)["rows"]
    TASKS.pop("mine/next_line")
    assert [row["id"] for row in rows] == ["0", "1"]
    assert all(row["score"] in (0.0, 1.0) for row in rows)


@pytest.mark.parametrize("name", lk.__all__)
def test_the_api_page_knows_every_public_name(name):
    """`mkdocs build --strict` fails for a directive that finds nothing."""
    directive = rf"^::: lookahead_jax\.{name}$"
    constants = rf"`lk\.{name}`"  # names without a docstring of their own
    kind = constants if name == "policies" or name.isupper() else directive
    assert re.search(kind, (ROOT / "docs" / "api.md").read_text(), re.M)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "docs/train.md"])
def test_the_paths_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    paths = re.findall(
        r"`((?:lookahead_jax|kernels|train|eval|tests|docs|examples)/[\w./-]*)`", text
    )
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_packages_of_the_architecture_page_are_those_of_the_import_test():
    rows = re.findall(
        r"^\| `(\w+)/` \|.*\| `([\w./]+)` \|$", (ROOT / "docs/architecture.md").read_text(), re.M
    )
    assert [name for name, _ in rows] == PACKAGES
    assert all((ROOT / "lookahead_jax" / name / start).is_file() for name, start in rows), rows


def test_the_makefile_has_the_tasks_that_pages_name():
    makefile = (ROOT / "Makefile").read_text()
    for page in ("CONTRIBUTING.md", "README.md", "docs/decisions.md", "CHANGELOG.md"):
        for tasks in re.findall(r"\bmake ((?:[a-z]+ )*[a-z]+)`", (ROOT / page).read_text()):
            for task in tasks.split():
                assert re.search(rf"^{task}:", makefile, re.M), (page, task)


def test_the_pages_name_all_policies_drafters_and_task_families():
    api = (ROOT / "docs" / "api.md").read_text()
    for name in [*POLICIES, *DRAFTERS, *STRATEGIES]:
        assert re.search(rf"[\s|(]{re.escape(name)}[,.) |]", api), name
    for policy in POLICIES.values():
        assert f"\n::: {policy.__module__}.{policy.__qualname__}\n" in api
    pages = (ROOT / "docs" / "evaluation.md").read_text()
    for family in {name.partition("/")[0] for name in TASKS}:
        assert f"`{family}" in pages, family
