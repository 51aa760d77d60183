"""Files that nobody meets half written, and words for when they cannot be written."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


class CannotWrite(RuntimeError):  # noqa: N818  (it reads as a sentence)
    """A file cannot be written: which, why, and what to do."""


_ADVICE = {
    errno.ENOSPC: "Free some room there.",
    errno.EDQUOT: "Free some room there, or raise the quota.",
    errno.EFBIG: "The system allows no file of that size there (`ulimit -f`).",
    errno.EROFS: "It is read-only: choose a folder that can be written to.",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.ENOTDIR: "Part of the path is a file: choose a folder.",
    errno.EEXIST: "Part of the path is a file: choose a folder.",
}

_PATIENCE = 10.0  # seconds: a process that was asked to end may still be saving


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes `path` under a temporary name first, as `write_safetensors` does.

    A failure takes this process's temporary files away, for they may fill the disk, and leaves what was there as it was.

    Raises:
        CannotWrite: instead of an OSError, or safetensors' own error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        for ending in (".tmp", f".{os.getpid()}.tmp"):  # its companions' too, such as `a_motion.safetensors`
            remove_temporary(path.parent, f"{glob.escape(path.stem)}*{path.suffix}{ending}")
        number = error.errno if isinstance(error, OSError) else _os_error(error)
        reason = os.strerror(number) if number else str(error)
        advice = _ADVICE.get(number or 0, "")
        raise CannotWrite(f"{path} cannot be written: {reason}. {advice}".rstrip()) from error


def _os_error(error: Exception) -> int | None:
    """The number in the messages of libraries that are written in Rust: `... (os error 28)`, or `Os { code: 28, ...`."""
    found = re.search(r"(?:os error |Os \{ code: )(\d+)", str(error))
    return int(found[1]) if found else None


def remove_temporary(folder: Path, pattern: str) -> None:
    """What was being written in a folder when a process was stopped or killed: files, and folders of `write_safetensors`."""
    for leftover in folder.glob(pattern):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place once all is written; the folder is made if missing.

    Raises:
        CannotWrite: as `writing`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        yield temporary
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """To a temporary name first; the folder is made if missing.

    Raises:
        CannotWrite: as `writing`.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before hours are spent on what it would hold; nothing is left behind.

    Raises:
        CannotWrite: it is a folder, or the folder that it would be in cannot be written to.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if missing, so that no second process writes there.

    A process that ends, or is killed, has let go of it. Where the file system knows no locks, nothing is held.

    Raises:
        CannotWrite: another process holds it and does not let go within seconds, or the folder cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / ".lock", timeout=_PATIENCE))
        except Timeout as error:
            raise CannotWrite(
                f"Another process is writing to {folder}. Wait until it ends, or choose another place."
            ) from error
        except (NotImplementedError, OSError):
            pass
        yield
