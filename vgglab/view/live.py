"""A run in a notebook: a live dashboard, or a static block if the front end has no widgets.

The dashboard's daemon thread only assigns widget values. It neither prints nor uses pyplot, whose output would end up
in whatever cell is running. ``front_end`` detects the front end; ``VGGLAB_UI=live|static`` overrides it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, Sequence

from vgglab.errors import UserError
from vgglab.runs.run import ACTIVE, Event, Run
from vgglab.storage.events import LongEvents
from vgglab.view.progress import Progress, loss_text
from vgglab.view.rank_table import rank_table, stall_warning
from vgglab.view.tables import Table, html_text
from vgglab.view.terminal import Terminal

REFRESH_SECONDS = 0.5
PICTURE_SECONDS = 2.0  # drawing slows down the cell that is running in the kernel
STATIC_REFRESH_SECONDS = 3.0
NUM_LOG_LINES = 6


def front_end() -> str:
    """Return ``live`` (widgets), ``static`` (a headless notebook, or no widgets), or ``terminal`` (no notebook)."""
    ipython = sys.modules.get("IPython")  # imported in every notebook
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
        return "terminal"
    override = os.environ.get("VGGLAB_UI")
    if override in ("live", "static"):
        return override
    # Jupyter's server sets JPY_SESSION_NAME for kernels that a person has opened; papermill does not.
    is_interactive = (
        "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules or "__vsc_ipynb_file__" in shell.user_ns
    )
    if not is_interactive:
        return "static"
    try:
        import ipykernel
        import ipywidgets  # noqa: F401
    except ImportError:
        return "static"
    loses_updates = ipykernel.__version__.startswith("7.0.")  # from threads: a dashboard would freeze
    return "static" if loses_updates else "live"


def watch(run: Run) -> None:
    """Show ``run`` in a live dashboard and return at once; without widgets, follow the run to its end."""
    kind = front_end()
    if kind == "live":
        Dashboard(run).show()
    elif kind == "static":
        _follow(run, _StaticBlock(run), STATIC_REFRESH_SECONDS)
    else:
        _follow(run, _TerminalLines(run), REFRESH_SECONDS)


def _follow(run: Run, block: Any, interval_seconds: float) -> None:
    try:
        while run.status in ACTIVE:
            block.update()
            time.sleep(interval_seconds)
    except KeyboardInterrupt:
        if hasattr(run, "wait"):  # the object that ``launch`` returned; any other run continues
            run.stop()
        raise
    finally:
        block.update()
    if hasattr(run, "wait"):
        run.wait()  # raises the error that ended the run


class _TerminalLines:
    def __init__(self, run: Run) -> None:
        self.run, self.terminal = run, Terminal()
        self.seen: Sequence[Event] = []

    def update(self) -> None:
        events = self.run.events()
        first = len(self.seen)
        try:
            is_continued = [*events[:first][-1:]] == [*self.seen[-1:]]
        except UserError:  # the file was replaced
            is_continued = False
        if not is_continued:  # a resume discards the events after its checkpoint
            self.terminal.close()
            first = max((index for index, event in enumerate(events) if event["event"] == "start"), default=0)
        for event in events[first:]:
            self.terminal(event)
        self.seen = events


class _StaticBlock:
    """A line and a picture, updated in place; the executed notebook keeps their last state."""

    def __init__(self, run: Run) -> None:
        from IPython.display import display

        self.run = run
        self.line = display({"text/plain": "starting"}, raw=True, display_id=True)
        self.picture: Any = None

    def update(self) -> None:
        from IPython.display import display

        from vgglab.view.figures import curves

        progress = progress_of(self.run)
        text = summary(self.run, progress)
        markup = html_text(text)
        ranks = ranks_of(self.run)
        if ranks:
            text, markup = f"{text}\n{ranks}", markup + ranks._repr_html_()
        self.line.update({"text/plain": text, "text/html": markup}, raw=True)
        if progress.train and self.picture is None:
            self.picture = display(curves(self.run), display_id=True)
        elif progress.train:
            self.picture.update(curves(self.run))


class Board:
    """Widgets: a status line, a progress bar and a Stop button, updated by a thread until the run is over.

    ``run`` is a run or several seeds.
    """

    def __init__(self, run: Any, parts: Sequence[Any], stop_tooltip: str, description: str) -> None:
        """``parts``: widgets below the bar; ``description`` is shown when the kernel no longer exists."""
        import ipywidgets as widgets

        self.run = run
        self.status = widgets.HTML()
        self.bar = widgets.IntProgress(layout=widgets.Layout(width="100%"))
        self.stop_button = widgets.Button(description="Stop", icon="stop", tooltip=stop_tooltip)
        self.stop_button.on_click(self._on_stop)
        self.widget = widgets.VBox([self.status, self.bar, *parts, self.stop_button])
        self.description = description

    def show(self) -> None:
        from IPython.display import display

        self.refresh()
        display({**self.widget._repr_mimebundle_(), "text/plain": self.description}, raw=True)
        threading.Thread(target=self.refresh_until_over, daemon=True, name="vgglab dashboard").start()

    def refresh_until_over(self) -> None:
        """Call ``refresh`` repeatedly until the run is over, and once after that; show errors and continue.

        If an error ended the thread silently, the last metrics shown would look current.
        """
        is_last = False
        while not is_last:
            try:
                is_last = self.is_over()
                self.refresh()
            except Exception as error:
                self.status.value = html_text(f"this dashboard cannot be updated: {error!r}", "b")
            if not is_last:
                time.sleep(REFRESH_SECONDS)
        self.stop_button.disabled, self.stop_button.description = True, "Ended"

    def _on_stop(self, _: Any) -> None:
        self.stop_button.disabled, self.stop_button.description = True, "Stopping"
        # Not on the kernel's thread: stopping can take the whole grace period.
        threading.Thread(target=self.run.stop, daemon=True).start()

    def refresh(self) -> None:
        raise NotImplementedError

    def is_over(self) -> bool:
        return self.run.status not in ACTIVE


class Dashboard(Board):
    """Progress, curves, ranks, last log lines and a Stop button."""

    def __init__(self, run: Run) -> None:
        import ipywidgets as widgets

        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.ranks, self.log = widgets.HTML(), widgets.HTML()
        stop_tooltip = "Stop this run after the current step and save a checkpoint"
        description = f"vgglab.Run({str(run.path)!r}).watch() shows this run again"
        super().__init__(run, [self.picture, self.ranks, self.log], stop_tooltip, description)
        self.stop_button.disabled = not run.is_here
        self._drawn: Any = None  # the latest events in the picture
        self._drawn_at = -PICTURE_SECONDS

    def refresh(self) -> None:
        from vgglab.view.figures import curves

        progress = progress_of(self.run)
        self.status.value = html_text(summary(self.run, progress), "b")
        self.bar.max, self.bar.value = max(progress.num_steps, 1), progress.step
        ranks = ranks_of(self.run)
        self.ranks.value = ranks._repr_html_() if ranks else ""
        # Rank 0 has no log of its own while its launcher is starting it.
        lines = self.run.last_lines(0, NUM_LOG_LINES) or self.run.last_lines("launcher", NUM_LOG_LINES)
        self.log.value = html_text("\n".join(lines), "pre", "font-size: 85%")
        latest = progress.train, progress.eval
        is_due = self.is_over() or time.monotonic() - self._drawn_at >= PICTURE_SECONDS
        if progress.train and latest != self._drawn and is_due:
            self.picture.value = curves(self.run).png()
            self._drawn, self._drawn_at = latest, time.monotonic()


def ranks_of(run: Run) -> Table | None:
    """Return the rank table; None for a run with one rank."""
    table = rank_table(run)
    return table if len(table.rows) > 1 else None


def progress_of(run: Run) -> Progress:
    """Return the current progress of a run. Of its many events, only the latest of each kind matters."""
    events = run.events()
    if isinstance(events, LongEvents):
        events = events.latest_of_each_kind()
    latest: dict[str, Event] = {}
    for event in reversed([*events]):
        latest.setdefault(event["event"], event)
    progress = Progress()
    for event in reversed(latest.values()):
        progress.add(event)
    if (progress.status in ACTIVE) != (run.status in ACTIVE):  # killed, or restarted in the same directory
        progress.status = progress.activity = run.status
        progress.eta_seconds = None
    return progress


def summary(run: Run, progress: Progress) -> str:
    """Return the progress, loss, accuracy, speed, remaining time and any warnings in one line."""
    parts = [f"{run.name}: {progress.activity}"]
    if progress.num_steps:
        parts.append(f"step {progress.step} of {progress.num_steps}")
    if progress.train:
        parts.append(f"loss {loss_text(progress.train['loss'])}")
        is_simulated, rate = progress.train.get("simulated"), progress.train.get("images_per_second")
        speed = "speed not measured" if rate is None else f"{rate:.1f} images/s"
        parts.append("simulated card" if is_simulated else speed)
    if progress.eval:
        note = " of generated images" * progress.start.get("is_fake", False)
        parts.append(f"held-out top-1 {progress.eval['acc1']:.2f} %{note}")
    parts.append(progress.time_left())
    if run.status in ACTIVE:
        parts.append(stall_warning(run))
    return " · ".join(filter(None, [*parts, *run.damage()]))
