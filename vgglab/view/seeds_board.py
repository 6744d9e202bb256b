"""Several seeds in a notebook: progress, the table so far and a Stop button; without widgets, only the final table."""

from __future__ import annotations

from typing import Any

from vgglab.view.live import Board, front_end, progress_of, summary
from vgglab.view.tables import html_text, show


def watch(seeds: Any) -> None:
    """Show ``LaunchedSeeds`` in a live table and return at once; without widgets, wait and show the final table."""
    if front_end() == "live":
        SeedsDashboard(seeds).show()
        return
    try:
        seeds.wait()
    finally:
        show(seeds)


class SeedsDashboard(Board):
    """Progress, table and a Stop button, until the last seed is done."""

    def __init__(self, seeds: Any) -> None:
        import ipywidgets as widgets

        self.table = widgets.HTML()
        stop_tooltip = "Stop this run and do not start the next one"
        super().__init__(seeds, [self.table], stop_tooltip, f"vgglab.Seeds({str(seeds.path)!r}) shows these runs")
        self.bar.max = len(seeds.seed_values)

    def refresh(self) -> None:
        current, num_done = self.run.current, sum(run.status == "done" for run in self.run.runs)
        text = f"{num_done} of {len(self.run.seed_values)} seeds done"
        if current is not None:
            text = f"{text} · {summary(current, progress_of(current))}"
        self.status.value, self.bar.value = html_text(text, "b"), num_done
        self.table.value = self.run.table()._repr_html_()

    def is_over(self) -> bool:
        return self.run.is_over
