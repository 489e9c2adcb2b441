"""How much memory is free: on an accelerator, or for this process on the host."""

from pathlib import Path
from typing import Any

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: Any = None) -> int | None:
    """Free bytes of a JAX device, or of the host for CPU devices and None; None if unknown."""
    stats = None if device is None else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    bounds = [bytes for bytes in (_of_machine(), _of_container()) if bytes is not None]
    return min(bounds, default=None)


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text("ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _of_container() -> int | None:
    """What the control group (version 2) leaves; file pages can be dropped and count as free."""
    try:
        limit, used = ((_CGROUP / f"memory.{n}").read_text().strip() for n in ("max", "current"))
        fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(fields["inactive_file"])
    except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
        return None
