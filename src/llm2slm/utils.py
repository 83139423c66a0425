"""What this machine and this process say of themselves; the standard library alone, so that `--help` stays quick."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Literal


def cpu_model() -> str:
    """The processor's name."""
    if os.path.exists("/proc/cpuinfo"):  # Linux, where platform.processor() is empty
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_bytes(which: Literal["VmRSS", "VmHWM"]) -> int | None:
    """
    Memory of this process, now (`"VmRSS"`) or the most at a time (`"VmHWM"`); `None` where the system does not say.
    `ru_maxrss` would be the parent's, if that was larger when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def reset_peak() -> bool:
    """Sets this process's `"VmHWM"` back to what it has now; whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_freed_memory() -> None:
    """
    Returns freed memory to the system, where that is asked of the C library. Batches of ever other sizes leave holes
    between the blocks in use: a long training on the CPU would come to hold several times what it needs.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
