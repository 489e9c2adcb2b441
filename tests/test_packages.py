"""Wheels are complete, also from a checkout without symbolic links (git on Windows, archives)."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("lookahead_jax", "kernels", "train", "eval", "pyproject.toml", "README.md", "LICENSE")
LINKS = ("kernels", "train", "eval")


def checkout(folder: Path, *, links: bool) -> Path:
    """A copy of what a wheel is built from; without links, git writes a file with the target."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    if not links:
        for name in LINKS:
            link = folder / "lookahead_jax" / name
            target = os.readlink(link)
            link.unlink()
            link.write_text(target)
    return folder


def wheel_files(folder: Path) -> dict[str, int]:
    """Name and size of every file in the wheel built from `folder`."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", folder]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


@pytest.mark.slow
def test_wheels_with_and_without_links_hold_the_same_files(tmp_path):
    linked = wheel_files(checkout(tmp_path / "linked", links=True))
    plain = wheel_files(checkout(tmp_path / "plain", links=False))
    record = next(name for name in linked if name.endswith("RECORD"))
    assert {**plain, record: 0} == {**linked, record: 0}
    packaged = {name for name in linked if name.startswith("lookahead_jax/")}
    expected = set()
    for top in ("lookahead_jax", *LINKS):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".nbi", ".nbc"):
                name = path.relative_to(ROOT).as_posix()
                expected.add(name if top == "lookahead_jax" else f"lookahead_jax/{name}")
    assert packaged == expected


def test_a_checkout_without_links_says_what_to_do(tmp_path):
    folder = checkout(tmp_path / "plain", links=False)
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.meta_path[:] = [\n"
    code += "    f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    code += "import lookahead_jax"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    [line] = [line for line in run.stderr.splitlines() if line.startswith("ImportError")]
    assert "symbolic links" in line
    assert "pip install" in line
