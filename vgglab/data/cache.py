"""The cache: generated images, downloads, and lists of large folders."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator


def cache_folder() -> Path:
    """``$VGGLAB_CACHE`` if set, otherwise ``vgglab`` in the user's cache folder."""
    named = os.environ.get("VGGLAB_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgglab"


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Allow only one process on this machine at a time into the block.

    Best effort: if the file cannot be written or the file system has no locks, nothing waits. The block must be safe
    without the lock.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            lock = stack.enter_context(open(file, "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, also when the process is killed
        yield
