"""The files of deploy/ fit the server: flags, paths, metrics, and what their own tools accept."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from lookahead_jax.cli.main import parse
from lookahead_jax.cli.serve import Serve
from lookahead_jax.engine.prompt_store import StoreUse
from lookahead_jax.server.metrics import Metrics
from tests.test_packages import SOURCES

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
INSTRUCTIONS = {
    "ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK",
    "STOPSIGNAL", "ENTRYPOINT",
}  # fmt: skip


@pytest.fixture(scope="module")
def families():
    """The server's metrics by the names that a query may use; the labels of each."""
    stores = dict(prompt_store=StoreUse(), prefix_store=StoreUse())
    engine = SimpleNamespace(waiting=0, alive=0, cache_bytes=0, **stores)
    named = {}
    metrics = Metrics(engine)  # type: ignore[arg-type]
    metrics.responded("/", 200)
    metrics._finished.labels("eos")
    for family in metrics._registry.collect():
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                named.setdefault(sample.name, set()).update(sample.labels)
    return named


def test_the_board_asks_for_metrics_that_exist_and_for_all_of_them(families):
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"lookahead_\w+", target["expr"])
            assert names, panel["title"]
            assert set(names) <= set(families), panel["title"]
            for label in re.findall(r"by \((\w+)\)", target["expr"]):
                assert label in families[names[0]], panel["title"]
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert label in families[names[0]] | {"instance"}, panel["title"]
            asked.update(names)
    kinds = r"_(total|bucket|sum|count)$"
    everything = {re.sub(kinds, "", name) for name in families}
    assert everything == {re.sub(kinds, "", name) for name in asked}
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len({panel["id"] for panel in board["panels"]}) == len(places)


def unit():
    """The systemd unit, by section and key; repeated keys would be an error."""
    parser = ConfigParser(delimiters=["="], comment_prefixes=["#"], interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string((DEPLOY / "lookahead.service").read_text().replace("\\\n", " "))
    return parser


def test_the_unit_starts_a_server_with_a_key_and_lets_it_finish():
    service = unit()["Service"]
    program, *args = shlex.split(service["ExecStart"])
    config = parse(args)
    assert (Path(program).name, type(config)) == ("lookahead", Serve)
    credential = service["LoadCredential"].partition(":")[0]
    assert str(config.api_key_file) == f"%d/{credential}"
    assert config.limits.shutdown_seconds + 10 < float(service["TimeoutStopSec"])
    assert config.limits.max_connections < int(service["LimitNOFILE"])
    assert f"XDG_CACHE_HOME=%C/{service['CacheDirectory']}" in service["Environment"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_accepts_the_unit_and_finds_it_hardened(tmp_path):
    path = tmp_path / "lookahead.service"
    text = (DEPLOY / "lookahead.service").read_text()
    path.write_text(text.replace("/opt/lookahead/bin/lookahead", sys.executable))
    for command in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        run = ["systemd-analyze", *command, str(path)]
        ended = subprocess.run(run, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout


def dockerfile():
    """Instructions with their arguments, and the text."""
    text = (DEPLOY / "Dockerfile").read_text()
    code = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in code.splitlines() if line.strip()], text


def test_the_image_is_built_from_what_a_wheel_needs():
    instructions, text = dockerfile()
    assert {name for name, _ in instructions} <= INSTRUCTIONS
    copied = []
    for name, args in instructions:
        if name == "COPY" and not args.startswith("--from"):
            *sources, _ = args.split()
            copied += sources
    assert sorted(copied) == sorted(SOURCES)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"EXTRAS=([\w,]+)", text)
    assert set(",".join(extras).split(",")) == {"serve", "cuda", "tpu"}
    assert set(",".join(extras).split(",")) <= set(project["optional-dependencies"])
    (python,) = re.findall(r"^ARG PYTHON=(\S+)", text, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]


def test_the_image_runs_the_server_as_a_user_who_is_not_root():
    instructions, text = dockerfile()
    last = dict(instructions)
    assert int(last["USER"]) > 0
    program, *args = json.loads(last["ENTRYPOINT"])
    (shown,) = re.findall(r"lookahead (--api-key-file \S+)", text)
    config = parse([*args, *shown.split()])
    assert (program, type(config)) == ("lookahead", Serve)
    assert str(config.port) == last["EXPOSE"]
    assert f"http://127.0.0.1:{config.port}/health" in last["HEALTHCHECK"]
    assert f":{config.api_key_file}:" in text  # mounted where it is read
    order = [name for name, _ in instructions]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name == "RUN")
    check = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    compile(check[2], "healthcheck", "exec")


@pytest.mark.parametrize("name", ["lookahead.service", "Dockerfile", "grafana.json"])
def test_docs_name_the_file(name):
    assert f"deploy/{name}" in (ROOT / "docs" / "serving.md").read_text()
