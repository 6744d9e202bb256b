"""A table of groups of runs that differ only in their seed: number, mean and standard deviation."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Mapping, Sequence

from vgglab.errors import UserError
from vgglab.runs.run import Run
from vgglab.view.summaries import damage_of
from vgglab.view.tables import Table

MIN_SEEDS = 5  # minimum number of seeds for calling one group better than another
METRICS = {
    "last top-1 %": lambda run: run.report()["acc1_last"],
    "best top-1 %": lambda run: run.report()["acc1"],
    "last held-out loss": lambda run: run.events("eval")[-1]["loss"] if run.events("eval") else None,
}
HEADINGS = ("", "metric", "n", "mean", "standard deviation", "lowest", "highest")
FEW_SEEDS = f"fewer than {MIN_SEEDS} seeds: enough to show the spread, too few to tell which group is better"


def seeds_table(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Return a table with one row for each group and metric, over finished runs only.

    Notes below it report damaged files and too few seeds. The standard deviation is that of a sample: it
    divides by n - 1.
    """
    rows: list[list[str]] = []
    notes: list[str] = []
    for group, runs in groups.items():
        done = [run for run in runs if _is_done(run)]
        for metric, value_of in METRICS.items():
            values = [value for value in map(value_of, done) if value is not None]
            if not values:
                continue
            deviation = f"{stdev(values):.3g}" if len(values) > 1 else ""
            extremes = [f"{value:.4g}" for value in (min(values), max(values))]
            rows.append([group, metric, str(len(values)), f"{mean(values):.4g}", deviation, *extremes])
            if len(values) < MIN_SEEDS and FEW_SEEDS not in notes:
                notes.insert(0, FEW_SEEDS)
        notes += [f"{run.name}: {text}" for run in runs for text in damage_of(run)]
    return Table(HEADINGS, rows, note="; ".join(notes))


def _is_done(run: Run) -> bool:
    """Whether a run is done and has a report; for an active run, computing one would read all its events each time."""
    try:
        return run.status == "done" and bool(run.report())
    except UserError:
        return False
