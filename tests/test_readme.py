"""The README's Python runs as it stands, and what it links to exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_python_blocks_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    assert blocks
    exec("\n".join(blocks), {})
    assert len(capsys.readouterr().out.split()) > 10


def test_links_of_the_root_pages_exist():
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text("utf-8"))
        assert [link for link in links if not (ROOT / link).exists()] == [], page


def test_the_two_commands_that_ci_runs():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("lookahead demo")
    assert "pytest" in commands[1]
