"""The cache: generated images, downloads, and the compiler's temporary files."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.util
import os
import tempfile
from pathlib import Path
from typing import Iterator

from vgglab.storage.files import make_folder, writing


def cache_folder() -> Path:
    """``$VGGLAB_CACHE`` if set, otherwise ``vgglab`` in the user's cache folder."""
    named = os.environ.get("VGGLAB_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgglab"


def use_private_temporary_folder() -> None:
    """Put the temporary files of this process and its children into the cache folder, where only its owner can write.

    For libraries that load code from the temporary folder by a name that another user may have taken there.

    Raises:
        UserError: the folder cannot be created, or is not ours.
    """
    multiprocessing.util.get_temp_dir()  # the loader's sockets stay where they are: their paths have to be short
    folder = cache_folder() / "temporary"
    with writing(folder, "set VGGLAB_CACHE to a folder of your own"):
        make_folder(folder)
        if hasattr(os, "geteuid") and folder.stat().st_uid != os.geteuid():  # root may change any folder's mode
            raise OSError(errno.EPERM, "it belongs to another user")
        folder.chmod(0o700)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder.resolve())


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
