"""HTTP servers in processes of their own, for the programs of this folder that put load on them."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common import ROOT

START_SECONDS = 600  # a cold start compiles
STOP_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start a server; `{port}` in the command stands for its port."""

    name: str
    command: Sequence[str]
    folder: Path = ROOT
    """Where the command runs, so that it can name files without their folder."""
    packages: Sequence[str] = ()
    """Whose versions a report names; looked up by the Python of the command."""
    own: bool = False
    """Whether it is this library's, which has /metrics."""

    @property
    def shown(self) -> str:
        """The command without the path of its Python."""
        return " ".join(["python", *self.command[1:]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers on loopback."""

    launch: Launch
    port: int
    model: str
    process: subprocess.Popen
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


class Usage(NamedTuple):
    """What a process holds."""

    resident_mb: float
    threads: int
    descriptors: int


def lookahead(*options: str) -> Launch:
    """`lookahead serve` of this checkout."""
    command = [sys.executable, "-m", "lookahead_jax", "serve", "--port", "{port}", *options]
    return Launch(name="lookahead", command=command, packages=["jax"], own=True)


@contextlib.contextmanager
def serving(launch: Launch) -> Iterator[Served]:
    """Runs a server until the block ends; RuntimeError with its log if it does not start."""
    port = free_port()
    command = [part.replace("{port}", str(port)) for part in launch.command]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=launch.folder, stdout=out, stderr=out)
        try:
            model = _ready(process, port, log)
            yield Served(launch=launch, port=port, model=model, process=process, log=log)
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> int:
    """Asks a process to end; its exit status, which is negative if it had to be killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _ready(process: subprocess.Popen, port: int, log: Path) -> str:
    """The name of the served model, once there is an answer."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
                return json.load(answer)["data"][0]["id"]
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text('utf-8', 'replace')[-2000:]}")


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def usage(pid: int) -> Usage:
    """What a process holds now; FileNotFoundError without /proc, or if it has ended."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return Usage(
        resident_mb=round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 2),
        threads=len(os.listdir(process / "task")),
        descriptors=len(os.listdir(process / "fd")),
    )


def versions(launch: Launch) -> dict[str, str]:
    """The versions of its packages."""
    program = "import sys, json, importlib.metadata as m\n"
    program += "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    command = [launch.command[0], "-c", program, *launch.packages]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
