"""Users' text files, files that are whole or absent, JSON, the versions in use, and this machine.

At import it needs the standard library alone, so that `--help` stays quick.
"""

import contextlib
import ctypes
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TextIO

PACKAGES = ("llm-to-slm", "transformers", "torch", "datasets", "accelerate", "peft")  # that a result depends on
JEMALLOC_PURGE = b"arena.4096.purge"  # of all arenas (MALLCTL_ARENAS_ALL): https://jemalloc.net/jemalloc.3.html


# --------------------------------------------------------------------------------------------------------------- files

MAX_NEW_TOKENS = 128  # of a checkpoint whose generation config says no length


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


def shown(path: str | os.PathLike) -> Path:
    """The path as one types it: from the working directory on, if it is below."""
    path, here = Path(path), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def check_new_file(path: str | os.PathLike | None) -> None:
    """
    Checks, before any long work, that a result can be written.

    Raises:
        OSError: if the file exists, or its folder does not.
    """
    if path is None:
        return
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; delete it or choose another name.")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(Path(path).parent)!r} to write {Path(path).name} into.")


@contextlib.contextmanager
def write_whole(path: str | os.PathLike, replace: bool = False) -> Iterator[TextIO]:
    """
    Opens `path` + ".part" to write text, and renames it to `path` at the end: what stands there is complete.

    Args:
        path (`str` or `os.PathLike`): The file.
        replace (`bool`, *optional*, defaults to `False`): Whether it may take the place of one that is there.

    Raises:
        OSError: if the file exists and may not be replaced, or it cannot be written.
    """
    part = f"{os.fspath(path)}.part"
    with open(part, "w", encoding="utf-8") as file:
        yield file
    if not replace:
        check_new_file(path)
    os.replace(part, path)


def write_json(path: str | os.PathLike, content: Any, replace: bool = False) -> None:
    """Writes JSON as [`write_whole`] does."""
    with write_whole(path, replace) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a folder aside, and renames it to `folder`: what stands there is complete."""
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    write(aside)
    aside.rename(folder)


def read_json(path: str | os.PathLike, *wanted: str) -> dict[str, Any]:
    """
    A JSON object with some fields.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [name for name in wanted if name not in content]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a report: {error}") from error
    if missing:
        raise ValueError(f"{path} is not the report asked for: it lacks {', '.join(missing)}.")
    return content


def text_lines(path: str | os.PathLike) -> Iterator[str]:
    """The lines of a user's text file with their ends, as [`decode_text`] reads it, without the whole in memory."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            for line in file:
                if "\0" in line:
                    decode_text(b"\0", path)  # which says what is wrong
                yield line
        except UnicodeDecodeError as error:
            decode_text(error.object, path)
            raise


def json_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """
    The rows of a JSON Lines file, one after another.

    Raises:
        ValueError: if the file is not UTF-8, or a line is not a JSON object.
    """
    for number, line in enumerate(text_lines(path), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} must be an object with columns, got {line.strip()[:40]!r}.")
        yield row


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, as [`json_lines`] reads them."""
    return list(json_lines(path))


def check_settings(path: str | os.PathLike, settings: dict[str, Any], work: str | os.PathLike) -> None:
    """
    Checks that what was begun, if anything was, is what is asked for now.

    Args:
        path (`str` or `os.PathLike`): The JSON file with the settings it was begun with.
        settings (`dict[str, Any]`): Those of now.
        work (`str` or `os.PathLike`): What the error calls the unfinished work.

    Raises:
        ValueError: if they differ.
    """
    if not os.path.exists(path):
        return
    begun = read_json(path)
    if other := [name for name in settings if begun.get(name) != settings[name]]:
        raise ValueError(
            f"{work} was begun with other settings: `{other[0]}` was {begun.get(other[0])!r}, and is "
            f"{settings[other[0]]!r}. Say the same, choose another --output, or delete {work}."
        )


# ------------------------------------------------------------------------------------------- versions and this machine
def check_installed(what: str, *modules: str, install: str = "pip install 'llm-to-slm[train]'") -> None:
    """
    Checks, before any work, that optional packages are there; none is imported.

    Args:
        what (`str`): What needs them, for the error.
        modules (`str`): The names they are imported by.
        install (`str`, *optional*): The line that installs them.

    Raises:
        ImportError: if one is missing.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ImportError(f"{what} needs {' and '.join(missing)}, not installed here: {install}")


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # with its build, which an index may leave out of the package's version
    return found


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "gpu": gpu}


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


def peak_memory_gib() -> float | None:
    """The most memory this process had at a time, in GiB; `None` where the system does not say."""
    peak_bytes = resident_bytes("VmHWM")
    return None if peak_bytes is None else round(peak_bytes / 2**30, 3)


def reset_peak() -> bool:
    """Sets this process's `"VmHWM"` back to what it has now; whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_freed_memory() -> None:
    """
    Returns freed memory to the system: glibc's or jemalloc's, if that is in its place. Batches of ever other sizes
    leave holes between the blocks in use: a long training on the CPU would come to hold several times what it needs.
    """
    if os.name != "posix":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallctl"):
        library.mallctl(JEMALLOC_PURGE, None, None, None, ctypes.c_size_t(0))
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
