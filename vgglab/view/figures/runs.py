"""Figures of runs: learning curves, and time per step."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from vgglab.errors import UserError
from vgglab.runs.run import Event, Run
from vgglab.view.figures.base import BLUE, COLOURS, DASHES, GREEN, INK, ORANGE, PURPLE, NotebookFigure, new_figure


def curves(run: Run) -> NotebookFigure:
    """Plot loss and top-1 accuracy over the optimizer steps, for training batches and held-out images."""
    train, held_out = _sampled_events(run, "train"), _sampled_events(run, "eval")
    figure, (loss, accuracy) = new_figure(2)
    for start in run.events("start"):
        classes = start["num_classes"]
        loss.axhline(math.log(classes), color=INK, linestyle=":", linewidth=1, label=f"guessing, ln {classes}")
        accuracy.axhline(100 / classes, color=INK, linestyle=":", linewidth=1, label=f"guessing, 1 in {classes}")
    _curve(loss, train, held_out, "loss")
    loss.set_ylabel("cross entropy")
    _curve(accuracy, train, held_out, "acc1")
    accuracy.set_ylabel("top-1 in %")
    accuracy.set_ylim(-3, 103)
    for panel in (loss, accuracy):
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if train or held_out:
            panel.legend(fontsize=9, frameon=False)
    return figure


def _curve(panel: Any, train: list[dict], held_out: list[dict], metric: str) -> None:
    if train:
        steps, values, group_size = [e["step"] for e in train], _values(train, metric), -(-len(train) // MAX_POINTS)
        if group_size > 1:  # a long run; if a value is nan, so is the mean, which leaves a gap
            indices = range(0, len(train) - group_size + 1, group_size)
            steps = [steps[index + group_size - 1] for index in indices]
            values = [sum(values[index : index + group_size]) / group_size for index in indices]
        label = "training batch" if group_size == 1 else f"training batches, mean of every {group_size} logged steps"
        panel.plot(steps, values, color=BLUE, linewidth=1.2, alpha=0.8, label=label)
    if held_out:
        panel.plot(
            [e["step"] for e in held_out],
            _values(held_out, metric),
            "o--",
            color=ORANGE,
            markersize=5,
            label="held-out images",
        )


def _sampled_events(run: Run, kind: str) -> list[Event]:
    """Return the events of a curve; for a very long run, an evenly spaced selection."""
    events = run.events(kind)
    return list(events[:: -(-len(events) // MAX_EVENTS) or 1])


def _legend_label(name: str) -> str:
    """Return the name for the legend, with a space before a leading underscore: matplotlib omits such names."""
    return f" {name}" if name.startswith("_") else name


def _values(events: list[dict], metric: str) -> list[float]:
    return [float("nan") if event[metric] is None else event[metric] for event in events]


MAX_EVENTS = 20_000  # events read for a curve
MAX_POINTS = 1000  # of a curve, which a dashboard redraws every two seconds


def curves_beside(
    runs: Sequence[Run], names: Sequence[str] = (), first_difference: int | None = None
) -> NotebookFigure:
    """Plot training loss and held-out top-1 of several runs; a line marks the step at which two runs first differ."""
    figure, (loss, accuracy) = new_figure(2, height=3 + 0.2 * (len(runs) + 1))  # one legend line per name
    for number, run in enumerate(runs):
        name = _legend_label(names[number] if names else run.name)
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "label": name}
        for panel, kind, metric in ((loss, "train", "loss"), (accuracy, "eval", "acc1")):
            events = _sampled_events(run, kind)
            if not events:  # a name without a curve would only fill the legend
                continue
            marker = "o" if kind == "eval" or len(events) == 1 else None
            panel.plot([e["step"] for e in events], _values(events, metric), marker=marker, markersize=4, **style)
    if first_difference is not None:
        for panel in (loss, accuracy):
            panel.axvline(first_difference, color=INK, linewidth=1, linestyle=":", label="first difference")
    legend: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.18)}  # run names are long
    _finish(loss, "training loss, cross entropy", **legend)
    _finish(accuracy, "held-out top-1 in %", **legend)
    return figure


def bands(groups: Mapping[str, Sequence[Run]]) -> NotebookFigure:
    """Plot training loss and held-out top-1 of groups of seeds: the mean, and a band from minimum to maximum."""
    figure, (loss, accuracy) = new_figure(2)
    for number, (name, runs) in enumerate(groups.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        for panel, kind, metric in ((loss, "train", "loss"), (accuracy, "eval", "acc1")):
            steps, rows = _common_steps(runs, kind, metric)
            if not steps:
                continue
            label = _legend_label(f"{name}, n = {len(rows[0])}")
            panel.plot(steps, [sum(row) / len(row) for row in rows], label=label, **style)
            panel.fill_between(
                steps, list(map(min, rows)), list(map(max, rows)), color=style["color"], alpha=0.2, linewidth=0
            )
    _finish(loss, "training loss, cross entropy")
    _finish(accuracy, "held-out top-1 in %")
    return figure


def _common_steps(runs: Sequence[Run], kind: str, metric: str) -> tuple[list[int], list[list[float]]]:
    """Return the steps that all runs have recorded, and for each step the values of the runs."""
    events = [_sampled_events(run, kind) for run in runs]
    values_by_run = [dict(zip([e["step"] for e in run_events], _values(run_events, metric))) for run_events in events]
    values_by_run = [values for values in values_by_run if values]  # excludes runs that have only just begun
    steps = sorted(set.intersection(*[set(values) for values in values_by_run])) if values_by_run else []
    return steps, [[values[step] for values in values_by_run] for step in steps]


def _finish(panel: Any, label: str, **legend: Any) -> None:
    panel.set_ylabel(label)
    panel.set_xlabel("optimizer step")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.lines:
        panel.legend(fontsize=8, frameon=False, **legend)


PHASE_STYLES = {
    "data": (ORANGE, "waiting for data"),
    "copy": ("#E69F00", "copying, normalising"),
    "forward": (BLUE, "forward"),
    "backward": ("#56B4E9", "backward"),
    "all_reduce": (PURPLE, "averaging gradients"),
    "optimizer": (GREEN, "optimizer"),
    "host": ("#999999", "host and everything else"),
}
FREQUENT_READS = 0.5  # host reads per step; log lines cause fewer
WARNING_STYLE: dict[str, Any] = {"va": "center", "fontsize": 8, "color": ORANGE}
HATCHES = ("", "//", "", "..", "xx", "\\\\", "")


def where_time_goes(runs: Sequence[Run], names: Sequence[str] = ()) -> NotebookFigure:
    """Plot one stacked bar per run: mean time of each phase of a step; needs runs that were trained with --timers.

    Without ``names``, a bar is labelled with batch size, precision and layout. Lines of code at which the host reads a
    value from the device more than once in two steps are listed below the bar.
    """
    if not runs:
        raise UserError("where_time_goes: needs runs that were trained with --timers")
    figure = NotebookFigure(9.0, 1.4 + 0.7 * len(runs))
    panel = figure.subplots()
    for index, run in enumerate(runs):
        report, left = run.report(), 0.0
        phase_seconds, reads = report["phase_seconds"] or {}, report["host_reads"] or {}
        for (phase, (colour, label)), hatch in zip(PHASE_STYLES.items(), HATCHES):
            width = 1000 * phase_seconds.get(phase, 0.0)
            panel.barh(
                index, width, 0.6, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5,
                label=label if index == 0 else None,
            )  # fmt: skip
            left += width
        panel.text(left, index, f" {left:.0f} ms", va="center", fontsize=9, color=INK)
        frequent = [
            f"{number:.2g}x per step at {location}" for location, number in reads.items() if number > FREQUENT_READS
        ]
        if frequent:
            text = f"! the host waits for the device: {', '.join(frequent)}"
            panel.annotate(text, (0, index + 0.42), (3, 0), textcoords="offset points", **WARNING_STYLE)
    panel.set_yticks(range(len(runs)), list(names) or [_bar_label(run) for run in runs], fontsize=9)
    panel.set_ylim(len(runs) - 0.4, -0.5)
    panel.set_xlabel("mean time per step (ms)")
    panel.margins(x=0.12)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _bar_label(run: Run) -> str:
    report = run.report()
    precision = report["amp_dtype"] or ("tf32" if report["tf32"] else "float32")
    layout = "channels last" if report["channels_last"] else "channels first"
    return f"batch {report['batch_size']}, {precision},\n{layout}{', compiled' * report['compiled']}"
