"""Programs that a model wrote, compiled and run under limits; nothing here runs unasked.

The limits bound time, memory, output, files and processes, the environment is empty, and what a
program leaves running is killed with it. They are no wall: a program still reads what the user may
read. Use a container for models you do not trust.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SECONDS = 3
_HEADERS = (
    "cstdio iostream vector algorithm numeric cmath cstring set map queue stack list fstream "
    "climits cassert iomanip sstream bitset"
)
_PRELUDE = "".join(f"#include <{name}>\n" for name in _HEADERS.split()) + "using namespace std;\n"


# The limits are set by an interpreter that then becomes the command: in a process with threads, as
# ours is, Python code between fork and exec may hang.
_LIMITED = """
import os, resource, sys
memory, seconds, processes = map(int, sys.argv[1:4])
for name, limit in (
    ("CPU", seconds), ("AS", memory), ("FSIZE", 2**26), ("CORE", 0), ("NPROC", processes)
):
    if name != "NPROC" or os.getuid() != 0:  # for root there is no such limit
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, limit))
os.execv(sys.argv[4], sys.argv[4:])
"""


def _tasks() -> int:
    """Processes and threads of this user; 0 where there is no /proc."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # ended since it was listed
            lines = dict(line.split(b":", 1) for line in path.read_bytes().splitlines())
            if int(lines[b"Uid"].split()[0]) == os.getuid():
                found += int(lines[b"Threads"])
    return found


def run_limited(
    command: Sequence[str],
    given: str,
    *,
    folder: Path,
    seconds: int = SECONDS,
    memory: int = 2**29,
    processes: int = 64,
) -> str | None:
    """What `command` prints, given `given`; None if it fails or goes beyond a limit.

    `command` begins with the path of a program. What it prints goes to a file, where the limit on
    files bounds it.
    """
    # What the system counts is all that the user runs, threads too, not this command's alone.
    limits = [str(n) for n in (memory, seconds, _tasks() + processes)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LIMITED, *limits, *command], cwd=folder,
            stdin=subprocess.PIPE, stdout=said, stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath}, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(given.encode(), timeout=seconds)
        except (subprocess.TimeoutExpired, OSError):
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what it has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        try:
            return said.read().decode() if process.returncode == 0 else None
        except UnicodeDecodeError:
            return None


def run_cpp(program: str, cases: Sequence[tuple[str, str]]) -> bool:
    """The C++11 program compiles and turns every input into exactly its output.

    Raises RuntimeError without a g++: a missing compiler is no wrong answer.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("pseudo_to_code needs g++, and there is none on this machine")
    with tempfile.TemporaryDirectory(prefix="lookahead-exec-") as name:
        folder = Path(name)
        (folder / "program.cpp").write_text(_PRELUDE + program, encoding="utf-8")
        build = [compiler, "-std=c++11", "-O", "-o", "program", "program.cpp"]
        # A compiler forks a few times only, but must be able to: other programs of the user may
        # start meanwhile, and those in other containers are counted without being seen.
        limits = dict(seconds=60, memory=2**32, processes=2**12)
        if run_limited(build, "", folder=folder, **limits) is None:
            return False
        run = [str(folder / "program")]
        return all(run_limited(run, given, folder=folder) == right for given, right in cases)
