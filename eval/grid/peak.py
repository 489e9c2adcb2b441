"""Peak memory during a piece of work, as far as the platform reports it."""

import contextlib
from pathlib import Path

import jax

_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peak:
    """A measurement: create it before the work and read it afterwards.

    On accelerators, the allocator's high-water mark, summed over this process's devices. It cannot
    be reset, so work that does not raise it has only an upper bound. On a CPU under Linux, the
    peak resident memory of the process, which can be reset.
    """

    def __init__(self) -> None:
        self._before = self._device()
        self.resets = False
        if self._before is None:
            with contextlib.suppress(OSError):
                _REFS.write_text("5")
                self.resets = True

    def read(self) -> tuple[int | None, bool]:
        """Bytes at the peak (None if unknown), and whether that is only an upper bound."""
        after = self._device()
        if after is not None:
            return after, after == self._before
        with contextlib.suppress(OSError):
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024, not self.resets
        return None, True

    @staticmethod
    def _device() -> int | None:
        stats = [device.memory_stats() for device in jax.local_devices()]
        marks = [stat["peak_bytes_in_use"] for stat in stats if stat]
        return sum(marks) if marks else None
