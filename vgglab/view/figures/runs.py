"""Figures of runs: learning curves, and time per step."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from vgglab.errors import UserError
from vgglab.runs.run import Event, Run
from vgglab.view.figures.base import BLUE, COLOURS, DASHES, GREEN, INK, ORANGE, PURPLE, NotebookFigure, new_figure

MAX_EVENTS = 20_000  # events read for a curve
MAX_POINTS = 1000  # of a curve, which a dashboard redraws every two seconds
COMPARED = (("train", "loss"), ("eval", "acc1"))  # in the two panels in which runs are compared
COMPARED_LABELS = ("training loss, cross entropy", "held-out top-1 in %")


def curves(run: Run) -> NotebookFigure:
    """Plot loss and top-1 accuracy over the optimizer steps, for training batches and held-out images."""
    train, held_out = _sampled_events(run, "train"), _sampled_events(run, "eval")
    figure, (loss, accuracy) = new_figure(2)
    for start in run.events("start"):
        classes = start["num_classes"]
        loss.axhline(math.log(classes), color=INK, linestyle=":", linewidth=1, label=f"guessing, ln {classes}")
        accuracy.axhline(100 / classes, color=INK, linestyle=":", linewidth=1, label=f"guessing, 1 in {classes}")
    for panel, metric in ((loss, "loss"), (accuracy, "acc1")):
        if train:
            _plot_training(panel, *_points(train, metric))
        if held_out:
            panel.plot(*_points(held_out, metric), "o--", color=ORANGE, markersize=5, label="held-out images")
    accuracy.set_ylim(-3, 103)
    _finish((loss, accuracy), ("cross entropy", "top-1 in %"), fontsize=9)
    return figure


def _plot_training(panel: Any, steps: list[int], values: Any) -> None:
    group_size = -(-len(steps) // MAX_POINTS)
    num_groups = len(steps) // group_size
    # If a value is nan, so is the mean, which leaves a gap.
    means = values[: num_groups * group_size].reshape(num_groups, group_size).mean(axis=1)
    label = "training batch" if group_size == 1 else f"training batches, mean of every {group_size} logged steps"
    panel.plot(steps[group_size - 1 :: group_size], means, color=BLUE, linewidth=1.2, alpha=0.8, label=label)


def _sampled_events(run: Run, kind: str) -> list[Event]:
    """Return the events of a curve; for a very long run, an evenly spaced selection."""
    events = run.events(kind)
    return list(events[:: -(-len(events) // MAX_EVENTS) or 1])


def _points(events: Sequence[Event], metric: str) -> tuple[list[int], Any]:
    """Return the steps and an array of the values; a missing value is nan."""
    return [event["step"] for event in events], np.array([event[metric] for event in events], float)


def _line(number: int, name: str) -> dict[str, Any]:
    """The colour, dashes and label of a line. A name with a leading "_" gets a space before it, or legends omit it."""
    label = f" {name}" if name.startswith("_") else name
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "label": label}


def curves_beside(runs: Sequence[Run], first_difference: int | None = None) -> NotebookFigure:
    """Plot training loss and held-out top-1 of several runs; a line marks the step at which two runs first differ."""
    figure, panels = new_figure(2, height=3 + 0.2 * (len(runs) + 1))  # one legend line per name
    for number, run in enumerate(runs):
        for panel, (kind, metric) in zip(panels, COMPARED):
            steps, values = _points(_sampled_events(run, kind), metric)
            if steps:  # a name without a curve would only fill the legend
                marker = "o" if kind == "eval" or len(steps) == 1 else None
                panel.plot(steps, values, marker=marker, markersize=4, **_line(number, run.name))
    if first_difference is not None:
        for panel in panels:
            panel.axvline(first_difference, color=INK, linewidth=1, linestyle=":", label="first difference")
    _finish(panels, COMPARED_LABELS, loc="upper left", bbox_to_anchor=(0, -0.18))  # run names are long
    return figure


def bands(groups: Mapping[str, Sequence[Run]]) -> NotebookFigure:
    """Plot training loss and held-out top-1 of groups of seeds: the mean, and a band from minimum to maximum."""
    figure, panels = new_figure(2)
    for number, (name, runs) in enumerate(groups.items()):
        for panel, (kind, metric) in zip(panels, COMPARED):
            steps, values = _common_points(runs, kind, metric)
            if steps:
                (line,) = panel.plot(steps, values.mean(axis=1), **_line(number, f"{name}, n = {values.shape[1]}"))
                lowest, highest = values.min(axis=1), values.max(axis=1)
                panel.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)
    _finish(panels, COMPARED_LABELS)
    return figure


def _common_points(runs: Sequence[Run], kind: str, metric: str) -> tuple[list[int], Any]:
    """Return the steps that all runs have recorded, and an array with a row per step and a column per run."""
    by_run = [dict(zip(*_points(_sampled_events(run, kind), metric))) for run in runs]
    by_run = [values for values in by_run if values]  # excludes runs that have only just begun
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    return steps, np.array([[values[step] for values in by_run] for step in steps])


def _finish(panels: Sequence[Any], labels: Sequence[str], fontsize: int = 8, **legend: Any) -> None:
    for panel, label in zip(panels, labels):
        panel.set(xlabel="optimizer step", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.lines:
            panel.legend(fontsize=fontsize, frameon=False, **legend)


PHASE_STYLES = {
    "data": (ORANGE, "", "waiting for data"),
    "copy": ("#E69F00", "//", "copying, normalising"),
    "forward": (BLUE, "", "forward"),
    "backward": ("#56B4E9", "..", "backward"),
    "all_reduce": (PURPLE, "xx", "averaging gradients"),
    "optimizer": (GREEN, "\\\\", "optimizer"),
    "host": ("#999999", "", "host and everything else"),
}
FREQUENT_READS = 0.5  # host reads per step; log lines cause fewer


def where_time_goes(runs: Sequence[Run], names: Sequence[str]) -> NotebookFigure:
    """Plot one stacked bar per run: mean time of each phase of a step; needs runs that were trained with --timers.

    ``names`` are the labels of the bars. Lines of code at which the host reads a value from the device more than once
    every two steps are listed below the bar.
    """
    if not runs:
        raise UserError("where_time_goes: needs runs that were trained with --timers")
    reports, rows = [run.report() for run in runs], range(len(runs))
    figure = NotebookFigure(9.0, 1.4 + 0.7 * len(runs))
    panel = figure.subplots()
    ends = np.zeros(len(runs))
    for phase, (colour, hatch, label) in PHASE_STYLES.items():
        widths = np.array([1000 * (report["phase_seconds"] or {}).get(phase, 0.0) for report in reports])
        panel.barh(
            rows, widths, 0.6, left=ends, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5
        )
        ends += widths
    for row, end, report in zip(rows, ends, reports):
        panel.text(end, row, f" {end:.0f} ms", va="center", fontsize=9, color=INK)
        reads = (report["host_reads"] or {}).items()
        frequent = ", ".join(f"{number:.2g}x per step at {line}" for line, number in reads if number > FREQUENT_READS)
        if frequent:
            text = f"! the host waits for the device: {frequent}"
            place: dict[str, Any] = {"xy": (0, row + 0.42), "xytext": (3, 0), "textcoords": "offset points"}
            panel.annotate(text, **place, va="center", fontsize=8, color=ORANGE)
    panel.set_yticks(rows, names, fontsize=9)
    panel.set(ylim=(len(runs) - 0.4, -0.5), xlabel="mean time per step (ms)")
    panel.margins(x=0.12)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure
