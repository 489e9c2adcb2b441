"""Configuration files as defaults of options, and the settings that a run's folder keeps."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from lookahead_jax.host.config_files import UsageError, cli_with_file
from lookahead_jax.host.run_folder import SETTINGS, keep_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    names: tuple[str, ...] = ("q",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    out: Path
    inner: Inner
    rate: float = 0.5
    limit: int | None = None
    span: tuple[int, int] | None = None
    kind: Literal["a", "b"] = "a"
    part: int = 0
    parts: int = 1
    run_code: bool = False

    def __post_init__(self) -> None:
        if self.part >= self.parts:
            raise ValueError(f"part {self.part} of {self.parts}")


FILE = {
    "inner": {"size": 3, "names": ["k", "v"]}, "rate": 1, "limit": 7, "span": [1, 2], "kind": "b",
}  # fmt: skip


def parse(folder, fields, *options):
    path = folder / "own.json"
    path.write_text(json.dumps(fields))
    return cli_with_file(Command, [str(path), *options], folder, "prog", refused=("run_code",))


def test_a_file_s_values_are_defaults_that_options_override(tmp_path):
    inner = Inner(size=3, names=("k", "v"))
    command = parse(tmp_path, FILE, "--out", "run")
    assert command == Command(
        out=Path("run"), inner=inner, rate=1.0, limit=7, span=(1, 2), kind="b"
    )
    assert isinstance(command.rate, float)
    changed = parse(tmp_path, FILE, "--out", "run", "--inner.size", "4", "--limit", "None")
    assert changed == dataclasses.replace(
        command, limit=None, inner=dataclasses.replace(inner, size=4)
    )
    written = json.loads(json.dumps(dataclasses.asdict(command), default=str))
    del written["run_code"]
    assert parse(tmp_path, written) == command, "what is written down can be read"
    named = cli_with_file(Command, ["own", "--out", "x", "--inner.size", "1"], tmp_path, "prog")
    assert named.inner == Inner(size=1, names=("k", "v"))
    single = parse(tmp_path, {"inner": {"size": 1, "names": "q"}}, "--out", "x")
    assert single.inner.names == ("q",), "one value stands for a list of one"


def test_without_a_file_the_defaults_are_those_of_the_class(tmp_path, capsys):
    command = cli_with_file(Command, ["--out", "x", "--inner.size", "1"], tmp_path, "prog")
    assert command == Command(out=Path("x"), inner=Inner(size=1))
    with pytest.raises(SystemExit):
        cli_with_file(Command, ["--help"], tmp_path, "prog")
    assert "(default: 0.5)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(tmp_path, FILE, "--help")
    assert "(default: 1.0)" in capsys.readouterr().out, "the help shows the file's values"


def test_a_file_may_need_its_overrides(tmp_path):
    """A file is checked as a whole only after the options: alone, part 1 of 1 would be wrong."""
    command = parse(tmp_path, FILE | {"part": 1, "out": "o"}, "--parts", "2")
    assert (command.part, command.parts) == (1, 2)
    with pytest.raises(UsageError, match="--out"):
        parse(tmp_path, FILE)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"epochs": 3}, "own.json: unknown field 'epochs'; known: out, inner, rate"),
        ({"inner": {"size": 1, "depth": 2}}, "own.json: inner: unknown field 'depth'"),
        ({"limit": 5.5}, r"own.json: limit: expected int \| None, got 5.5"),
        ({"limit": True}, r"limit: expected int \| None, got true"),
        ({"inner": {"size": "3"}}, 'inner: size: expected int, got "3"'),
        ({"inner": {"size": 1, "names": 5}}, "names: expected str, got 5"),
        ({"span": [1]}, "span: expected"),
        ({"kind": "c"}, r"kind: expected Literal\['a', 'b'\], got \"c\""),
        ({"run_code": True}, "run_code may only be set by --run-code, not in a file"),
        ({"run-code": True}, "run_code may only be set by --run-code, not in a file"),
    ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(tmp_path, FILE | {"out": "run"} | changes)


def test_a_wrong_option_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="--ratio") as error:
        parse(tmp_path, FILE, "--out", "run", "--ratio", "3")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"neither a .json file nor one of the presets \(own\)"):
        cli_with_file(Command, ["absent"], tmp_path, "prog")


def test_a_folder_keeps_the_settings_it_was_started_with(tmp_path):
    folder = tmp_path / "run"
    keep_settings(folder, {"seed": 0, "lengths": (1, 2)}, "*.npz")
    keep_settings(folder, {"seed": 0, "lengths": (1, 2)}, "*.npz")
    with pytest.raises(
        ValueError, match=r"other settings \(seed: 0, now 1, data: not stored, now 'x'\); choose"
    ):
        keep_settings(folder, {"seed": 1, "lengths": (1, 2), "data": "x"}, "*.npz")
    (folder / SETTINGS).unlink()
    (folder / "a.npz").touch()
    with pytest.raises(ValueError, match=r"has results .* but no settings.json"):
        keep_settings(folder, {"seed": 0}, "*.npz")


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b'"seed"'])
def test_foreign_settings_are_one_clear_line(tmp_path, content):
    (tmp_path / SETTINGS).write_bytes(content)
    with pytest.raises(ValueError, match=r"settings.json: (not valid JSON|expected a JSON object)"):
        keep_settings(tmp_path, {"seed": 0}, "*.npz")
