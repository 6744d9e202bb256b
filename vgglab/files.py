"""Files that others may have put there: read within limits, written without following links. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Iterator

from vgglab.errors import UserError

MOST_BYTES = 2**24  # of a document, or of a line


def exists(path: Path) -> bool:
    """Also False where that may not be asked."""
    try:
        return path.exists()
    except OSError:
        return False


def read_bytes(file: Path, most: int = MOST_BYTES) -> bytes | None:
    """All of a file; None where it is larger than any of its kind, or no file at all. Raises UserError, to be read."""
    try:
        if not file.is_file() or file.stat().st_size > most:
            return None
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def tail_of(file: Path, num_bytes: int = 4096) -> bytes:
    """The end of a file; empty where it cannot be read."""
    try:
        if not file.is_file():
            return b""
        with file.open("rb") as lines:
            lines.seek(0, os.SEEK_END)
            lines.seek(max(0, lines.tell() - num_bytes))
            return lines.read(num_bytes)
    except OSError:
        return b""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses in the block is a UserError that names the place."""
    try:
        yield
    except OSError as error:
        advice = "name another folder with --output-dir or --run-dir"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {advice}") from None


def without_links(file: str, flags: int) -> int:
    """An ``opener``: a link in a place that is written to would lead the text elsewhere, a pipe would wait for ever."""
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        number = os.open(file, flags | safe, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{file} is a link") from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, f"{file} is a pipe") from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, f"{file} is no regular file")
    return number


def make_folder(folder: Path) -> None:
    """Raises OSError, also where it is a link that somebody else has put there."""
    if folder.is_symlink() and hasattr(os, "geteuid") and folder.lstat().st_uid not in (0, os.geteuid()):
        raise OSError(errno.ELOOP, f"{folder} is a link of another user")
    folder.mkdir(parents=True, exist_ok=True)
