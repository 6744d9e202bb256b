"""Objects for notebooks, each with its own display: a run, the runs in a folder, and the runs of several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

from vgglab.errors import printable
from vgglab.runs.folder import run_dirs
from vgglab.runs.run import Run
from vgglab.runs.seeds import Seeds
from vgglab.view import live
from vgglab.view.seeds_table import seeds_table
from vgglab.view.summaries import Report, run_as_html, runs_table, status_line
from vgglab.view.tables import Table


class NotebookRun(Run):
    """A run directory, which can be read while the run is active and after it has ended; displayed as a summary."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})  # {status_line(self)}"

    def _repr_html_(self) -> str:
        return run_as_html(self)

    def report(self) -> Report:
        """The final metrics: from ``report.json`` if it matches the events, otherwise computed from them."""
        return Report(super().report())

    def watch(self) -> None:
        """Show the run in a notebook: a live dashboard, or a static picture if the front end has no widgets."""
        live.watch(self)


class Runs(List[NotebookRun]):
    """The runs in one or more folders, oldest first; displayed as a table.

    >>> vgglab.Runs()[-1].watch()
    >>> vgglab.Runs("shared/runs", "runs")
    """

    def __init__(self, *folders: str | Path) -> None:
        """Find the runs; the default folder is ``runs``. Raises UserError if a folder does not exist."""
        runs = map(NotebookRun, run_dirs([Path(folder) for folder in folders or ("runs",)]))
        super().__init__(sorted(runs, key=lambda run: run.created))

    def __repr__(self) -> str:
        return str(runs_table(self))

    def _repr_html_(self) -> str:
        return runs_table(self)._repr_html_()


class NotebookSeeds(Seeds):
    """A folder of runs that differ only in their seed; displayed as a table."""

    run_type = NotebookRun

    def curves(self) -> Any:
        """Plot the mean loss and accuracy over the seeds, with a band from minimum to maximum."""
        from vgglab.view.figures import bands  # matplotlib is not needed for reading

        return bands({printable(self.path.name): self.runs})

    def table(self) -> Table:
        """Return a table of the count, mean, standard deviation and range of each metric over the finished seeds."""
        return seeds_table({printable(self.path.name): self.runs})

    def __repr__(self) -> str:
        return repr(self.table()) if self.table().rows else f"{printable(self.path.name)}: no seed has finished yet"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
