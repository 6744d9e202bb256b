"""File locks that are released when their process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import time
from pathlib import Path
from typing import Iterator

from vgglab.errors import UserError
from vgglab.storage.files import nofollow_opener

MAX_WAIT_SECONDS = 30.0
_held: set[tuple[int, int]] = set()  # files that we have locked; opening and closing one again would release its lock


class LockHeld(Exception):
    """Another process holds the lock."""


class Lock:
    """Acquires a lock and holds it until this process ends or calls ``close``.

    Attributes:
        is_held: False if the file system does not support locks.

    Raises:
        LockHeld: another process holds it.
        OSError: the file cannot be created.
    """

    def __init__(self, file: Path) -> None:
        self.is_held = False
        self._file = open(file, "ab", opener=nofollow_opener)  # noqa: SIM115
        status = os.fstat(self._file.fileno())
        self._identity = status.st_dev, status.st_ino
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.close()
            raise LockHeld from None
        except OSError:
            return
        self.is_held = True
        _held.add(self._identity)

    def close(self) -> None:
        self._file.close()
        _held.discard(self._identity)


def holder(file: Path) -> int | None:
    """The ID of the process that holds the lock; 0 if none does, None if unknown. Does not acquire the lock."""
    if struct.calcsize("P") != 8 or os.uname().sysname != "Linux":  # other layouts of struct flock
        return None
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:  # a link: perhaps to another run's lock
            return None
        if (status.st_dev, status.st_ino) in _held:
            return os.getpid()
        with open(file, "rb", opener=nofollow_opener) as target:
            request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, pid = struct.unpack("hhqqi4x", fcntl.fcntl(target, fcntl.F_GETLK, request))
    except OSError:
        return None
    return 0 if kind == fcntl.F_UNLCK else pid or None  # Linux gives 0 for a process outside our container


@contextlib.contextmanager
def exclusive_access(folder: Path) -> Iterator[None]:
    """Allow only one process or thread at a time into the block, if the file system can lock a folder.

    Raises:
        UserError: another process, perhaps another user's, has kept the folder locked for ``MAX_WAIT_SECONDS``.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{folder}: another process has locked this folder; use another folder") from None
                time.sleep(0.05)
                continue
            except OSError:  # the file system does not support such locks
                pass
            break
        yield
    finally:
        os.close(descriptor)
