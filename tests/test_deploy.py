"""The files of deploy/ fit the server: flags, paths, metrics, and what their own tools accept."""

import contextlib
import http.client
import http.server
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from lookahead_jax.cli.main import parse
from lookahead_jax.cli.serve import Serve
from lookahead_jax.engine.prompt_store import StoreUse
from lookahead_jax.server.limits import ServerLimits
from lookahead_jax.server.metrics import Metrics
from tests.serving import until
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
    metrics = Metrics(engine, lambda: 0)  # type: ignore[arg-type]
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


def site(**places):
    """The site for nginx with other addresses, within a configuration that needs no rights."""
    text = (DEPLOY / "nginx.conf").read_text()
    for old, new in places.items():
        assert old in text
        text = text.replace(old, new)
    return text


def test_the_site_fits_the_limits_of_the_server():
    (body,) = re.findall(r"client_max_body_size (\d+)m;", text := site())
    assert int(body) * 2**20 == ServerLimits().max_body_bytes
    (seconds,) = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert int(seconds) > ServerLimits().request_seconds
    shown = (
        (ROOT / "docs" / "serving.md").read_text().partition("```nginx\n")[2].partition("```")[0]
    )
    lines = [line.strip() for line in text.splitlines()]
    assert [line for line in shown.splitlines() if line.strip() not in lines] == []


class Replica(http.server.BaseHTTPRequestHandler):
    """Answers as a server whose queue is full to the key `greedy`, and tells its port to others."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        greedy = self.headers["Authorization"] == "Bearer greedy"
        answer = f"{self.server.server_address[1]} {len(body)}".encode()
        self.send_response(429 if greedy else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def replica():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replica)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def nginx(folder, servers):
    """nginx with the site, in front of two servers; what posts to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{name}_temp_path {folder}/{name};" for name in names)
    places = {"10.0.0.1:8000": servers[0], "10.0.0.2:8000": servers[1]}
    (folder / "site.conf").write_text(site(**places, **{"listen 8080": f"listen 127.0.0.1:{port}"}))
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; events {{}}\n"
        f"http {{ access_log off; {folders} include {folder}/site.conf; }}"
    )
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    command += ["-e", str(folder / "errors")]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr

    def post(key, size=10):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, 20)) as connection:
            connection.request("POST", "/v1/x", b"x" * size, {"Authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def listens():
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True

    with subprocess.Popen(command) as process:
        try:
            until(listens)
            yield post
        finally:
            process.terminate()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_nginx_brings_clients_back_and_lets_none_take_the_servers_from_others(tmp_path):
    keys = [f"key-{i}" for i in range(24)]
    with replica() as first, contextlib.ExitStack() as stack:
        second = stack.enter_context(replica())
        with nginx(tmp_path, [first, second]) as post:
            homes = {key: post(key) for key in keys}
            assert {status for status, _ in homes.values()} == {200}
            ports = {answer.partition(" ")[0] for _, answer in homes.values()}
            assert ports == {first.partition(":")[2], second.partition(":")[2]}
            assert post("key-0", 3 * 2**20)[1].endswith(f" {3 * 2**20}")
            assert post("key-0", 5 * 2**20)[0] == 413
            assert [post("greedy")[0] for _ in range(5)] == [429] * 5
            assert {key: post(key) for key in keys} == homes
            stack.close()  # the second server ends
            answers = {post(key)[1].partition(" ")[0] for key in keys}
            assert answers == {first.partition(":")[2]}


@pytest.mark.parametrize("name", ["lookahead.service", "Dockerfile", "grafana.json", "nginx.conf"])
def test_docs_name_the_file(name):
    assert f"deploy/{name}" in (ROOT / "docs" / "serving.md").read_text()
