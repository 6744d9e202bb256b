"""Safe access to files in folders that others can write to: size limits, no links, no pipes. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path
from typing import Iterator, Tuple

from vgglab.errors import UserError

MAX_BYTES = 2**24  # the largest document or line that is read
RECENT_SECONDS = 3.0  # the modification times of some file systems are rounded to two seconds
Stamp = Tuple[int, int, int, int]  # inode, size in bytes, times of modification and of status change in nanoseconds


def read_bytes(file: Path) -> bytes | None:
    """The content of a file; None if it is larger than ``MAX_BYTES``, a link, or not a regular file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_BYTES:
            return None
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def read_tail(file: Path, num_bytes: int) -> bytes:
    """The last ``num_bytes`` of a file; empty if it is a link or cannot be read."""
    try:
        with open(file, "rb", opener=nofollow_opener) as lines:
            lines.seek(max(0, os.fstat(lines.fileno()).st_size - num_bytes))
            return lines.read(num_bytes)
    except OSError:
        return b""


@contextlib.contextmanager
def write_errors(path: Path, advice: str = "choose another folder with --output-dir or --run-dir") -> Iterator[None]:
    """Turn an OSError in the block into a UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {advice}") from None


def nofollow_opener(file: str, flags: int) -> int:
    """An ``opener`` for ``open`` that refuses links, which may point elsewhere, and pipes, which would block."""
    try:
        descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        kinds = {errno.ELOOP: "a link", errno.ENXIO: "a pipe"}
        if error.errno not in kinds:
            raise
        raise OSError(error.errno, f"{file} is {kinds[error.errno]}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{file} is not a regular file")
    return descriptor


def make_folder(folder: Path) -> None:
    """Create a folder if necessary. Raises OSError if that fails, or if it is a symbolic link owned by another user."""
    if folder.is_symlink() and folder.lstat().st_uid not in (0, os.geteuid()):
        raise OSError(errno.ELOOP, f"{folder} is a symbolic link owned by another user")
    folder.mkdir(parents=True, exist_ok=True)


def inode_of(path: Path) -> str:
    """The inode number of a folder: a renamed folder keeps it, a copy has a different one.

    As text, because it may exceed 2**53; empty if there is no such folder.
    """
    return str(path.stat().st_ino) if path.exists() else ""


def stamp(file: Path) -> Stamp | None:
    """A value that changes when the file changes.

    None if there is no such file, or if it was changed so recently that another change might alter neither its size
    nor its modification time.
    """
    try:
        status = os.stat(file, follow_symlinks=False)
    except OSError:
        return None
    is_recent = abs(time.time() - status.st_mtime) < RECENT_SECONDS
    return None if is_recent else (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
