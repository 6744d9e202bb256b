"""Which image files a split has: ``<split>/<class>/<image>``, and a cached list for large folders.

Listing ImageNet's 1.28 million names takes minutes on a remote disk, each time, on every rank. So a large
listing is kept in the cache folder, one line per class folder, with the folder's modification times. They change when
a file is added or removed; only such folders are listed again. The cache key is the absolute path. Of several ranks,
one makes the listing while the others wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from array import array
from pathlib import Path
from typing import Dict, Iterable, NamedTuple, Sequence, overload

from vgglab.errors import UserError
from vgglab.storage.cache import cache_folder, one_at_a_time

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMAT = 2
SMALLEST_KEPT = 10_000  # files; fewer are listed faster than they are looked up
# A name that comes within the clock's step of a listing does not move the folder's time: young ones are not trusted.
SETTLED_NANOSECONDS = 2 * 10**9


class Listing(NamedTuple):
    """The sorted image names of a folder, and the state of the folder when they were read."""

    inode: int  # another folder under the same name has another
    changed: int  # ns; the later of its two times of change, the second of which cannot be set back
    listed: int  # when it was read, ns
    names: str  # joined by "/", which no name contains: a million small strings would cost 100 MB
    num_folders: int = 0  # that lie in it, and are not looked into

    def split(self) -> list[str]:
        return self.names.split("/") if self.names else []


Index = Dict[str, Listing]  # class folder -> its images, in sorted order; "" for those outside the folders


class Paths(Sequence[str]):
    """A list of paths in two flat buffers.

    A list of a million strings has a million reference counts, and a forked loader process copies a memory page for
    each one it touches: its memory would grow throughout the epoch.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        for path in paths:
            self._bytes += os.fsencode(path)
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError, counts from the end
        return os.fsdecode(bytes(self._bytes[self._ends[number] : self._ends[number + 1]]))


def read_index(folder: Path) -> Index:
    """All image files of a split, by class folder; hidden files and folders are left out.

    Raises:
        UserError: a class folder is a broken link.
        OSError: a folder cannot be read.
    """
    kept = _load(folder)
    if kept:
        return _refresh(folder, kept)
    with contextlib.suppress(OSError):
        _file_of(folder).parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(_file_of(folder).with_suffix(".lock")):
        return _refresh(folder, _load(folder))  # another rank may have made it meanwhile


def _refresh(folder: Path, kept: Index) -> Index:
    """Bring the index up to date and store it."""
    now = time.time_ns()
    index, own = {}, []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() and not os.path.exists(entry.path) and not _is_image(entry.name):
            raise UserError(f"--data-path: {entry.path} is a broken symbolic link; repair or remove it")
        if entry.is_dir():
            if not entry.name.startswith("."):
                index[entry.name] = _listing(entry, kept.get(entry.name), now)
        elif _is_image(entry.name):
            own.append(entry.name)
    index[""] = Listing(0, 0, now, "/".join(own))
    num_images = sum(listing.names.count("/") + 1 for listing in index.values())
    if num_images >= SMALLEST_KEPT and any(kept.get(name) != index[name] for name in index if name):
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time and nothing else
            _save(folder, index)
    return index


def _listing(folder: os.DirEntry, before: Listing | None, now: int) -> Listing:
    """The stored listing if the folder has not changed since, otherwise a new one."""
    status = os.stat(folder.path)  # asked first: what comes while we list makes it younger
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    is_same = before is not None and (before.inode, before.changed) == (status.st_ino, changed)
    if before is not None and is_same and before.listed - changed >= SETTLED_NANOSECONDS:
        return before
    images, num_folders = _contents(folder.path)
    return Listing(status.st_ino, changed, now, "/".join(images), num_folders)


def _contents(folder: str) -> tuple[list[str], int]:
    """The sorted images of a folder, and the number of its subfolders."""
    images, num_folders = [], 0
    for entry in os.scandir(folder):
        if _is_image(entry.name):
            images.append(entry.name)
        elif not entry.name.startswith(".") and entry.is_dir():
            num_folders += 1
    return sorted(images), num_folders


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _file_of(folder: Path) -> Path:
    name = hashlib.sha1(os.fsencode(os.path.realpath(folder))).hexdigest()
    return cache_folder() / "index" / f"{name}.jsonl"


def _load(folder: Path) -> Index:
    """The stored index; empty if it is missing or cannot be read."""
    try:
        with open(_file_of(folder), encoding="ascii") as lines:
            head, *listings = map(json.loads, lines)
            if head != [FORMAT, os.path.realpath(folder)]:
                return {}
            index = {name: Listing(*rest) for name, *rest in listings}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    is_ours = all(isinstance(listing.names, str) and isinstance(listing.listed, int) for listing in index.values())
    return index if is_ours else {}


def _save(folder: Path, index: Index) -> None:
    """Write to a temporary file, then rename it: readers see the old index or the new one."""
    file = _file_of(folder)
    number, beside = tempfile.mkstemp(prefix=file.stem, dir=file.parent)
    try:
        with open(number, "w", encoding="ascii") as lines:
            lines.write(json.dumps([FORMAT, os.path.realpath(folder)]) + "\n")
            for name, listing in index.items():
                lines.write(json.dumps([name, *listing]) + "\n")
        os.replace(beside, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
