"""One row per rank: its progress, speed and memory, and which rank the others wait for."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from vgglab.runs.run import Run
from vgglab.view.tables import Table

HEADINGS = ("rank", "step", "images/s", "loss", "peak memory", "time before sync", "")
# A straggler's own part of a step exceeds the others' median by this factor, and by this share of a step.
SLOWDOWN_FACTOR, MIN_STEP_SHARE = 1.25, 0.10
STALL_SECONDS = 30.0  # and at least ten times the usual interval


def rank_table(run: Run) -> Table:
    """Return a table of the latest metrics of each rank of a run, stragglers in bold; empty before the first log line.

    The speed counts only the rank's own images. The loss is that of its last batch, not averaged over the ranks. The
    time before sync is the mean time per step for loading, copying and the forward pass, before the rank waits for the
    others; it is measured on the host over the last few log lines, and also decides which rank is a straggler.
    """
    recent = run.recent_metrics()
    batch_size = run.config.get("batch_size", 0)
    rows, stragglers = [], []
    for number, events in enumerate(recent):
        metrics, own_seconds = events[-1], _own_seconds(events)
        others = [_own_seconds(other) for other in recent if other is not events]
        step_seconds = metrics["interval_seconds"] / metrics["interval_steps"]
        is_measured = not metrics.get("simulated")
        is_straggler = (
            is_measured
            and bool(others)
            and own_seconds > SLOWDOWN_FACTOR * median(others)
            and own_seconds - median(others) > MIN_STEP_SHARE * step_seconds
        )
        if is_straggler:
            stragglers.append(number)
        loss, peak_bytes = metrics["loss"], metrics.get("peak_bytes")
        rows.append(
            [
                str(metrics["rank"]),
                str(metrics["step"]),
                f"{batch_size / step_seconds:.1f}" if is_measured else "simulated",
                "not finite" if loss is None else f"{loss:.4f}",
                "" if peak_bytes is None else f"{peak_bytes / 2**30:.2f} GiB",
                f"{1000 * own_seconds:.0f} ms" if is_measured else "",
                "◀ the others wait for this rank" if is_straggler else "",
            ]
        )
    return Table(HEADINGS, rows, sides=">" * len(HEADINGS), bold_rows=stragglers)


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
