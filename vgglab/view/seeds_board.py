"""Several seeds in a notebook: progress, the table so far and a Stop button; without widgets, only the final table."""

from __future__ import annotations

import threading
from typing import Any

from vgglab.view.live import front_end, progress_of, refresh_until_over, summary
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


class SeedsDashboard:
    """Progress, table and a Stop button, updated by a thread until the last seed is done."""

    def __init__(self, seeds: Any) -> None:
        import ipywidgets as widgets

        self.seeds = seeds
        self.status, self.table = widgets.HTML(), widgets.HTML()
        self.bar = widgets.IntProgress(max=len(seeds.seed_values), layout=widgets.Layout(width="100%"))
        self.stop_button = widgets.Button(
            description="Stop", icon="stop", tooltip="Stop this run and do not start the next one"
        )
        self.stop_button.on_click(self._on_stop)
        self.widget = widgets.VBox([self.status, self.bar, self.table, self.stop_button])

    def show(self) -> None:
        from IPython.display import display

        self.refresh()
        display(self.widget)
        threading.Thread(target=self._refresh_until_over, daemon=True, name="vgglab seeds board").start()

    def refresh(self) -> None:
        current, num_done = self.seeds.current, sum(run.status == "done" for run in self.seeds.runs)
        text = f"{num_done} of {len(self.seeds.seed_values)} seeds done"
        if current is not None:
            text = f"{text} · {summary(current, progress_of(current))}"
        self.status.value, self.bar.value = html_text(text, "b"), num_done
        self.table.value = self.seeds.table()._repr_html_()

    def _refresh_until_over(self) -> None:
        refresh_until_over(self.refresh, lambda: self.seeds.is_over, self.status)
        self.stop_button.disabled, self.stop_button.description = True, "Ended"

    def _on_stop(self, _: Any) -> None:
        self.stop_button.disabled, self.stop_button.description = True, "Stopping"
        threading.Thread(target=self.seeds.stop, daemon=True).start()  # stopping can take the whole grace period
