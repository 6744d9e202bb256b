"""One row per rank: its progress, speed and memory, and which rank the others wait for."""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

from vgglab.runs.run import Run
from vgglab.view.tables import html_text

HEADINGS = ("rank", "step", "images/s", "loss", "peak memory", "time before sync", "")
# A straggler's own part of a step exceeds the others' median by this factor, and by this share of a step.
SLOWDOWN_FACTOR, MIN_STEP_SHARE = 1.25, 0.10
STALL_SECONDS = 30.0  # and at least ten times the usual interval


class RankRow(NamedTuple):
    """The latest metrics of a rank; ``images_per_second`` and ``own_seconds`` are None for a simulated card."""

    rank: int
    step: int
    images_per_second: float | None  # for this rank's part of the batch
    loss: float | None  # of its last batch, before averaging
    peak_bytes: int | None
    own_seconds: float | None  # per step, before the wait for the other ranks: loading, copying and forward pass,
    # measured on the host over the last few log lines, like is_straggler
    is_straggler: bool

    def cells(self) -> tuple[str, ...]:
        """Return the cells as text, one for each heading."""
        speed = "simulated" if self.images_per_second is None else f"{self.images_per_second:.1f}"
        return (
            str(self.rank),
            str(self.step),
            speed,
            "not finite" if self.loss is None else f"{self.loss:.4f}",
            "" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f} GiB",
            "" if self.own_seconds is None else f"{1000 * self.own_seconds:.0f} ms",
            "◀ the others wait for this rank" if self.is_straggler else "",
        )


def rank_rows(run: Run) -> list[RankRow]:
    """Return the latest metrics of each rank of a run; empty before the first log line."""
    recent = run.recent_metrics()
    batch_size = run.config.get("batch_size", 0)
    rows = []
    for events in recent:
        metrics, own_seconds = events[-1], _own_seconds(events)
        others = [_own_seconds(other) for other in recent if other is not events]
        step_seconds = metrics["interval_seconds"] / metrics["interval_steps"]
        is_slower = (
            bool(others)
            and own_seconds > SLOWDOWN_FACTOR * median(others)
            and own_seconds - median(others) > MIN_STEP_SHARE * step_seconds
        )
        is_measured = not metrics.get("simulated")
        rows.append(
            RankRow(
                rank=metrics["rank"],
                step=metrics["step"],
                images_per_second=batch_size / step_seconds if is_measured else None,
                loss=metrics["loss"],
                peak_bytes=metrics.get("peak_bytes"),
                own_seconds=own_seconds if is_measured else None,
                is_straggler=is_slower and is_measured,
            )
        )
    return rows


def _own_seconds(events: list[dict[str, Any]]) -> float:
    return sum(event["own_seconds"] for event in events) / sum(event["interval_steps"] for event in events)


def stall_warning(run: Run) -> str:
    """Return a warning if a run has not logged anything for much longer than usual, otherwise an empty string.

    The warning is given only between training steps, because an evaluation or the first step may take a long time.
    """
    events, latest = run.events(), run.ranks()
    if not latest or not events or events[-1]["event"] != "train":
        return ""
    seconds = time.time() - max(metrics["time"] for metrics in latest)
    usual = max(metrics["interval_seconds"] for metrics in latest)
    if seconds < max(STALL_SECONDS, 10 * usual):
        return ""
    return (
        f"no log line for {seconds:.0f} s (usually one every {usual:.0f} s); run.stacks() shows what each rank is doing"
    )


def as_text(rows: list[RankRow]) -> str:
    """Return the table as text."""
    table = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)).rstrip() for cells in table)


def as_html(rows: list[RankRow]) -> str:
    """Return the table as HTML; a straggler is shown in bold, and marked in the last column."""
    head = "".join(f"<th style='text-align: right; padding: 0 1em'>{heading}</th>" for heading in HEADINGS)
    lines = []
    for row in rows:
        style = "text-align: right; padding: 0 1em" + ("; font-weight: bold" if row.is_straggler else "")
        lines.append("".join(html_text(cell, "td", style) for cell in row.cells()))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table style='font-variant-numeric: tabular-nums'><tr>{head}</tr>{body}</table>"
