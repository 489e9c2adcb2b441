"""Runs programs that a model wrote, under limits. This is not a security boundary.

The limits bound time, memory, output, files and processes. Where Linux allows it, a program runs in
namespaces of its own: it has no network, it sees no process but its own, and everything it starts
ends with it. It starts with an empty environment. It can still read and change the files that the
user can: use a container or a virtual machine for models you do not trust.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

SECONDS = 3
_GRACE = 10  # seconds for the start of an interpreter on a busy machine
_HEADERS = (
    "cstdio iostream vector algorithm numeric cmath cstring set map queue stack list fstream "
    "climits cassert iomanip sstream bitset"
)
_PRELUDE = "".join(f"#include <{name}>\n" for name in _HEADERS.split()) + "using namespace std;\n"

# Mapped to an ordinary user, the program has no capabilities in the new namespaces either.
_NAMESPACES = (
    "--user", "--map-user=1000", "--map-group=1000", "--mount", "--mount-proc", "--pid", "--fork",
    "--kill-child", "--net", "--ipc",
)  # fmt: skip

# This runs between the evaluation and the command. It sets the limits, waits for the command, and
# kills what the command leaves behind. It is an interpreter of its own because Python code between
# fork and exec may hang in a process with threads.
_WAITER = """
import ctypes, os, resource, signal, sys, time
SET_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES, SET_SUBREAPER = 1, 38, 36  # of prctl
memory, seconds, processes = map(int, sys.argv[1:4])
prctl = ctypes.CDLL(None).prctl
prctl(SET_SUBREAPER, 1, 0, 0, 0)  # what loses its parent becomes a child of this process
waiter = os.getpid()
command = os.fork()
if command == 0:
    prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for name, limit in (
        ("CPU", seconds), ("AS", memory), ("FSIZE", 2**26), ("CORE", 0), ("NPROC", processes)
    ):
        if name != "NPROC" or os.getuid() != 0:  # root has no such limit
            kind = getattr(resource, f"RLIMIT_{name}")
            most = resource.getrlimit(kind)[1]
            limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
            resource.setrlimit(kind, (limit, limit))
    os.execv(sys.argv[4], sys.argv[4:])
for descriptor in (0, 1):  # the command's alone
    os.close(descriptor)
end, status = time.monotonic() + seconds, None
while status is None and time.monotonic() < end:
    pid, ended = os.waitpid(-1, os.WNOHANG)
    if pid == command:
        status = ended
    elif pid == 0:
        time.sleep(0.005)
if waiter != 1:  # process 1 of a namespace takes all others with it
    while True:
        with open(f"/proc/{waiter}/task/{waiter}/children") as file:
            children = [int(child) for child in file.read().split()]
        if not children:
            break
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
os._exit(0 if status == 0 else 1)
"""


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command that starts a program in namespaces of its own; empty if there is none.

    Warns, once, where programs can only be limited.
    """
    unshare = shutil.which("unshare")
    if unshare is not None:
        command = (unshare, *_NAMESPACES)
        probe = [*command, sys.executable, "-I", "-S", "-c", ""]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return command
    warnings.warn(
        "this system allows no namespaces (unshare), so programs that the model writes can use "
        "the network and read or kill this user's processes; use a container or a virtual machine",
        stacklevel=2,
    )
    return ()


def _tasks() -> int:
    """Processes and threads of this user; 0 where there is no /proc."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # ended since it was listed
            lines = dict(line.split(b":", 1) for line in path.read_bytes().splitlines())
            if int(lines[b"Uid"].split()[0]) == os.getuid():
                count += int(lines[b"Threads"])
    return count


def run_limited(
    command: Sequence[str],
    given: str,
    *,
    folder: Path,
    seconds: int = SECONDS,
    memory: int = 2**29,
    processes: int = 64,
) -> str | None:
    """What `command` prints with `given` as its input; None if it fails or exceeds a limit.

    `command` begins with the path of a program. `memory` is in bytes. Output goes to a file, where
    the limit on files bounds it. When this returns, all processes that the command started have
    ended; without namespaces (`isolation`), a program that kills its waiter can prevent that.
    """
    # RLIMIT_NPROC counts all that the user runs, threads too, not this command's processes alone.
    limits = [str(n) for n in (memory, seconds, _tasks() + processes)]
    waiter = [*isolation(), sys.executable, "-I", "-S", "-c", _WAITER, *limits]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*waiter, *command], cwd=folder, stdin=subprocess.PIPE, stdout=output,
            stderr=subprocess.DEVNULL, env={"PATH": os.defpath}, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(given.encode(), timeout=seconds + _GRACE)
        except (subprocess.TimeoutExpired, OSError):
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        try:
            return output.read().decode() if process.returncode == 0 else None
        except UnicodeDecodeError:
            return None


def run_cpp(program: str, cases: Sequence[tuple[str, str]]) -> bool:
    """Whether the C++11 program compiles and turns every input into exactly its output.

    Raises RuntimeError without g++: a missing compiler is not a wrong answer.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("pseudo_to_code needs g++; install it or leave the task out")
    with tempfile.TemporaryDirectory(prefix="lookahead-exec-") as name:
        folder = Path(name)
        (folder / "program.cpp").write_text(_PRELUDE + program, encoding="utf-8")
        build = [compiler, "-std=c++11", "-O", "-o", "program", "program.cpp"]
        # A compiler starts only a few processes, but must be able to: other programs of the user
        # may start meanwhile, and those in other containers are counted without being seen.
        limits = dict(seconds=60, memory=2**32, processes=2**12)
        if run_limited(build, "", folder=folder, **limits) is None:
            return False
        run = [str(folder / "program")]
        return all(run_limited(run, given, folder=folder) == right for given, right in cases)


def run_python(program: str) -> str | None:
    """What the Python program prints; None if it fails or exceeds a limit."""
    with tempfile.TemporaryDirectory(prefix="lookahead-exec-") as name:
        path = Path(name) / "program.py"
        path.write_text(program, encoding="utf-8")
        command = [sys.executable, "-I", "-S", str(path)]
        return run_limited(command, "", folder=path.parent)
