"""A run's folder belongs to one process at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lookahead_jax.host.lock import folder_lock

ROOT = Path(__file__).parent.parent
HOLD = (
    "import sys, time\n"
    f"sys.path.insert(0, {str(ROOT)!r})\n"
    "from pathlib import Path\n"
    "from lookahead_jax.host.lock import folder_lock\n"
    "with folder_lock(Path(sys.argv[1])):\n"
    "    print('held', flush=True); time.sleep(60)"
)


def test_a_second_process_is_told_who_writes_the_folder(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(BlockingIOError, match=rf"written by process {other.pid} on .*: wait"),
            folder_lock(tmp_path),
        ):
            pass
        with folder_lock(tmp_path, "lock.1"):  # another part of the work
            pass
        other.kill()
    with folder_lock(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    with folder_lock(tmp_path):
        pass
