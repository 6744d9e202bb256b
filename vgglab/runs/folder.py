"""Find runs in folders; the runs of several seeds are one level deeper."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Iterator, Sequence, overload

from vgglab.errors import UserError
from vgglab.runs.run import Run, is_a_run


class Runs(Sequence[Run]):
    """The runs in some folders, oldest first; displayed as a table.

    >>> vgglab.Runs()[-1].watch()
    >>> vgglab.Runs("shared/runs", "runs")
    """

    def __init__(self, *folders: str | Path) -> None:
        """Find the runs; the default folder is ``runs``. Raises UserError if a folder does not exist."""
        self.folders = [Path(folder) for folder in folders or ("runs",)]
        self._runs = sorted(map(Run, run_folders(self.folders)), key=lambda run: run.created)

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, index: int) -> Run: ...

    @overload
    def __getitem__(self, index: slice) -> list[Run]: ...

    def __getitem__(self, index: int | slice) -> Run | list[Run]:
        return self._runs[index]

    def __repr__(self) -> str:
        from vgglab.view.summaries import runs_table

        return str(runs_table(self))

    def _repr_html_(self) -> str:
        from vgglab.view.summaries import runs_table

        return runs_table(self)._repr_html_()


def run_folders(folders: Iterable[Path]) -> Iterator[Path]:
    """The run directories among these folders and in them, without duplicates, sorted by name within a folder.

    Raises:
        UserError: a folder does not exist.
    """
    seen = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for path in (folder, *sorted([*folder.glob("*"), *folder.glob("*/seed-*")])):
            if is_a_run(path) and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def series_in(folders: Iterable[Path]) -> dict[Path, list[Run]]:
    """The runs that differ only in their seed, grouped by folder; folders with one such run are left out."""
    found: dict[Path, list[Run]] = {}
    for path in run_folders(folders):
        if path.name.startswith("seed-"):
            found.setdefault(path.parent, []).append(Run(path))
    return {folder: runs for folder, runs in found.items() if len(runs) > 1}
