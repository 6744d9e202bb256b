"""Find runs in folders; the runs of a series of seeds are one level deeper."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Iterator

from vgglab.errors import UserError
from vgglab.runs.run import Run, is_run_dir


def run_dirs(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the run directories among these folders and their subfolders, without duplicates, sorted in each folder.

    Raises:
        UserError: a folder does not exist.
    """
    seen = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for path in (folder, *sorted([*folder.glob("*"), *folder.glob("*/seed-*")])):
            if is_run_dir(path) and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def find_series(folders: Iterable[Path]) -> dict[Path, list[Run]]:
    """Return the runs that differ only in their seed, by folder; folders with a single such run are left out."""
    series: dict[Path, list[Run]] = {}
    for path in run_dirs(folders):
        if path.name.startswith("seed-"):
            series.setdefault(path.parent, []).append(Run(path))
    return {folder: runs for folder, runs in series.items() if len(runs) > 1}
