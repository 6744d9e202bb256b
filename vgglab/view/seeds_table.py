"""A table of groups of runs that differ only in their seed: number, mean and standard deviation."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Mapping, NamedTuple, Sequence

from vgglab.runs.run import Run
from vgglab.view.summaries import damage_of, report_of, status_or_error
from vgglab.view.tables import Table

MIN_SEEDS = 5  # minimum number of seeds for calling one group better than another
METRICS = {
    "last top-1 %": lambda run: run.events("eval")[-1]["acc1"] if run.events("eval") else None,
    "best top-1 %": lambda run: run.report()["acc1"],
    "last held-out loss": lambda run: run.events("eval")[-1]["loss"] if run.events("eval") else None,
}
HEADINGS = ("", "metric", "n", "mean", "standard deviation", "lowest", "highest")


class Row(NamedTuple):
    """One metric of a group, over its finished runs."""

    group: str
    metric: str
    n: int
    mean: float
    deviation: float | None  # sample standard deviation; None for a single run
    lowest: float
    highest: float

    def cells(self) -> tuple[str, ...]:
        deviation = "" if self.deviation is None else f"{self.deviation:.3g}"
        numbers = (f"{self.mean:.4g}", deviation, f"{self.lowest:.4g}", f"{self.highest:.4g}")
        return (self.group, self.metric, str(self.n), *numbers)


def rows_of(groups: Mapping[str, Sequence[Run]]) -> list[Row]:
    """Return one row for each group and metric, over finished runs only."""
    rows = []
    for group, runs in groups.items():
        done = [run for run in runs if status_or_error(run) == "done" and report_of(run) is not None]
        for metric, value_of in METRICS.items():
            values = [value for value in map(value_of, done) if value is not None]
            if values:
                spread = stdev(values) if len(values) > 1 else None
                rows.append(Row(group, metric, len(values), mean(values), spread, min(values), max(values)))
    return rows


def few_seeds_note(rows: Sequence[Row]) -> str:
    """Return a warning if there are too few seeds to compare, otherwise an empty string."""
    if all(row.n >= MIN_SEEDS for row in rows):
        return ""
    return f"fewer than {MIN_SEEDS} seeds: enough to show the spread, too few to tell which group is better"


def _damage(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    return [f"{run.name}: {text}" for runs in groups.values() for run in runs for text in damage_of(run)]


def seeds_table(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Return a table with one row for each group and metric, and notes on damaged files and on too few seeds."""
    rows = rows_of(groups)
    return Table(
        HEADINGS, [row.cells() for row in rows], note="; ".join(filter(None, [few_seeds_note(rows), *_damage(groups)]))
    )
