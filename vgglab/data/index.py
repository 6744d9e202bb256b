"""List the image files of a split, ``<split>/<class>/<image>``; the list is not cached between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, NamedTuple

from vgglab.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Listing(NamedTuple):
    """The sorted image names of a folder."""

    names: str  # joined by "/", which no name contains: a million small strings would take 100 MB
    num_folders: int = 0  # number of subfolders, whose images are ignored

    def split(self) -> list[str]:
        return self.names.split("/") if self.names else []


Index = Dict[str, Listing]  # class folder -> its images, in sorted order; "" for images outside class folders


def read_index(folder: Path) -> Index:
    """List all image files of a split by class folder, without hidden files and folders.

    Raises:
        UserError: a class folder is a broken link.
        OSError: a folder cannot be read.
    """
    index, loose_images = {}, []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() and not os.path.exists(entry.path) and not _is_image(entry.name):
            raise UserError(f"--data-path: {entry.path} is a broken symbolic link; repair or remove it")
        if entry.is_dir():
            if not entry.name.startswith("."):
                index[entry.name] = _list_folder(entry.path)
        elif _is_image(entry.name):
            loose_images.append(entry.name)
    index[""] = Listing("/".join(loose_images))
    return index


def _list_folder(folder: str) -> Listing:
    images, num_folders = [], 0
    for entry in os.scandir(folder):
        if _is_image(entry.name):
            images.append(entry.name)
        elif not entry.name.startswith(".") and entry.is_dir():
            num_folders += 1
    return Listing("/".join(sorted(images)), num_folders)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")
