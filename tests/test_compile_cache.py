"""Commands keep compiled programs in the user's cache folder, and work without one."""

import os
import stat
import subprocess
import sys
import types
from collections import namedtuple

import jax
import pytest

from lookahead_jax.host import compile_cache as module
from lookahead_jax.host.compile_cache import keep_compiled_programs
from tests import tiny

FOLDER = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A process that has not imported JAX, with an empty home folder and its own environment."""
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(modules={}))
    return tmp_path


def test_the_folder_is_private_and_bounded(home):
    assert keep_compiled_programs() is None
    folder = home / ".cache" / "lookahead_jax" / "compiled"
    assert os.environ[FOLDER] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == module.MAX_BYTES
    for name in (FOLDER, *module._SETTINGS):
        assert hasattr(jax.config, name.lower()), "JAX has no such setting"


def test_the_user_s_settings_stay(home, monkeypatch):
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(home / "xdg"))
    monkeypatch.setitem(os.environ, "JAX_COMPILATION_CACHE_MAX_SIZE", "5")
    assert keep_compiled_programs() is None
    assert os.environ[FOLDER] == str(home / "xdg" / "lookahead_jax" / "compiled")
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "5"
    monkeypatch.setitem(os.environ, FOLDER, "mine")
    assert keep_compiled_programs() is None
    assert os.environ[FOLDER] == "mine"


def test_nothing_changes_once_jax_is_imported(home, monkeypatch):
    monkeypatch.setattr(module, "sys", sys)
    assert keep_compiled_programs() is None
    assert FOLDER not in os.environ
    assert list(home.iterdir()) == []


Usage = namedtuple("Usage", "free")


@pytest.mark.parametrize("problem", ["a file", "another user", "disk", "home"])
def test_a_folder_that_cannot_be_used_is_named(problem, home, monkeypatch):
    if problem == "a file":
        (home / ".cache").write_text("")
        reason = "not a directory"
    elif problem == "another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        reason = "belongs to another user"
    elif problem == "disk":
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage(free=2**20))
        reason = "less than 256 MiB left"
    else:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        monkeypatch.chdir(home)
        reason = "no home folder; set XDG_CACHE_HOME"
    message = keep_compiled_programs()
    assert message.startswith("compiled programs are not kept in ")
    assert reason in message
    assert FOLDER not in os.environ


def test_halves_of_entries_are_removed(home):
    folder = home / ".cache" / "lookahead_jax" / "compiled"
    folder.mkdir(parents=True)
    for name in (
        "whole-cache",
        "whole-atime",
        "killed-cache",
        "left-atime",
        "young-cache",
        "other",
    ):
        (folder / name).write_bytes(b"x")
        if not name.startswith("young"):
            os.utime(folder / name, (0, 0))
    assert keep_compiled_programs() is None
    left = {file.name for file in folder.iterdir()}
    assert left == {"whole-cache", "whole-atime", "young-cache", "other"}


@pytest.mark.slow
def test_a_second_command_compiles_nothing(tmp_path):
    tiny.save_bytes_model(tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def run(*options):
        words = ["generate", "--model", tmp_path, "--prompt", "abcdef", "--max-new-tokens", 4]
        command = [sys.executable, "-m", "lookahead_jax", *map(str, words), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done

    def entries():
        return {file.name for file in folder.iterdir() if file.name.endswith("-cache")}

    folder = tmp_path / "lookahead_jax" / "compiled"
    without = run("--no-compile-cache")
    assert not folder.exists()
    first = run()
    kept = entries()
    assert any(name.startswith("jit_prefill-") for name in kept)
    assert run().stdout == first.stdout == without.stdout
    assert entries() == kept
    for file in folder.glob("*-cache"):  # damaged entries are compiled again
        file.write_bytes(file.read_bytes()[:100])
    damaged = run()
    assert damaged.stdout == first.stdout
    assert "Traceback" not in damaged.stderr
