"""The cache: generated images, downloads, and the compiler's temporary files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing.util
import os
import tempfile
from pathlib import Path
from typing import Iterator

from vgglab.storage.files import make_folder, write_errors


def cache_folder() -> Path:
    """``$VGGLAB_CACHE`` if set, otherwise ``vgglab`` in the user's cache folder."""
    configured = os.environ.get("VGGLAB_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgglab"


def use_private_temporary_folder() -> None:
    """Put the temporary files of this process and its children into the cache folder, where only its owner can write.

    Some libraries load code from a file with a predictable name in the temporary folder; in a shared folder, another
    user could create that file first.

    Raises:
        UserError: the folder cannot be created, or belongs to another user.
    """
    multiprocessing.util.get_temp_dir()  # the loader's sockets stay in the usual folder: their paths have to be short
    folder = cache_folder() / "temporary"
    with write_errors(folder, "set VGGLAB_CACHE to a folder of your own"):
        make_folder(folder)
        if folder.stat().st_uid != os.geteuid():  # chmod below would not fail for root
            raise OSError(errno.EPERM, "it belongs to another user")
        folder.chmod(0o700)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder.resolve())


@contextlib.contextmanager
def best_effort_lock(file: Path) -> Iterator[None]:
    """Allow only one process on this machine to be in the block at a time.

    Best effort: if the file cannot be written or the file system does not support locks, the block runs without a lock,
    so the block must be safe without one.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = stack.enter_context(open(file, "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also if the process is killed
        yield
