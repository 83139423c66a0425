"""Users' text files, this machine and this process; the standard library alone, so that `--help` stays quick."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Literal


def decode_text(content: bytes, source: str | os.PathLike) -> str:
    r"""
    A user's text as a string whose lines end in `\n`: UTF-8, with a byte order mark or without, and with the line ends
    of any system.

    Args:
        content (`bytes`): The text as it is stored.
        source (`str` or `os.PathLike`): What errors call it.

    Raises:
        ValueError: if the text has another encoding.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        encoding = "UTF-16" if b"\0" in content else "WINDOWS-1252"
        raise ValueError(
            f"{source} is not UTF-8 text. Save it as UTF-8 where it was written, or convert it, for example with "
            f"`iconv -f {encoding} -t UTF-8`."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | os.PathLike) -> str:
    """A user's text file, as [`decode_text`] reads it."""
    return decode_text(Path(path).read_bytes(), path)


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
