"""The README's Python runs as it stands."""

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
