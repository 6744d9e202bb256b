"""Find the first difference between runs: compare their settings and data, then their metrics step by step.

    python -m vgglab.compare runs/A runs/B                    # bit for bit
    python -m vgglab.compare runs/A runs/B --tolerance 3e-4   # relative, e.g. between two kinds of hardware
    python -m vgglab.compare runs/A runs/B --png both.png     # plots both; --json also prints a JSON object
    python -m vgglab.compare runs/A runs/B runs/C --png all.png  # A with each of the others; --json prints a list

Exit codes: 0 the runs are the same, 1 they differ, 2 bad input (explained in one line).
"""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Sequence

from vgglab.errors import UserError
from vgglab.runs.run import Run
from vgglab.settings.config import settings_that_affect
from vgglab.storage.events import Event

STARTING_POINT = ("num_train_images", "num_eval_images", "num_classes", "num_parameters", "steps_per_epoch", "data")
# Causes before their effects.
METRICS = {"train": ("lr", "loss", "acc1"), "eval": ("loss", "acc1", "acc5", "num_images")}


class Difference(NamedTuple):
    """The first metric that differs."""

    step: int
    event: str  # train or eval
    figure: str
    values: tuple[Any, Any]
    relative: float


class Comparison(NamedTuple):
    """The comparison of two runs. ``first`` is the first difference in the steps that both logged, or None."""

    settings: dict[str, tuple[Any, Any]]  # those that differ, by name
    starting_point: dict[str, tuple[Any, Any]]  # the same for STARTING_POINT
    first: Difference | None
    largest_relative: float  # difference of the loss
    num_steps: int  # steps compared
    last_steps: tuple[int, int]  # of each run
    acc1: tuple[float | None, float | None]  # in percent, at the last evaluation
    damage: list[str]  # what was ignored in each run because it is damaged

    @property
    def is_same(self) -> bool:
        """Whether all metrics agree within the tolerance and both runs end at the same step."""
        return self.first is None and self.last_steps[0] == self.last_steps[1] and self.num_steps > 0

    def __repr__(self) -> str:
        return as_text(self)


def compare_runs(one: Run, other: Run, tolerance: float = 0.0) -> Comparison:
    """Compare two runs; relative differences up to ``tolerance`` are ignored.

    Raises:
        UserError: a run has no events yet, or its ``config.json`` is missing.
    """
    for run in (one, other):
        if not run.events("start"):
            raise UserError(f"{run.path}: has no events yet, so there is nothing to compare")
        if not run.config:
            raise UserError(f"{run.path}: config.json is missing; its settings cannot be compared")
    first, largest, num_steps, last_common = None, 0.0, 0, None
    for event, other_event in _matching_events(one, other):
        num_steps, last_common = num_steps + (event["step"] != last_common), event["step"]
        for metric in METRICS[event["event"]]:
            values = _value(event, metric), _value(other_event, metric)
            relative = _relative(*values)
            if metric == "loss":
                largest = max(largest, relative)
            if relative > tolerance and first is None:
                first = Difference(event["step"], event["event"], metric, values, relative)
    start, other_start = one.events("start")[0], other.events("start")[0]
    ignored = settings_that_affect("record", "location", "launch", "others")
    settings = [name for name in {**one.config, **other.config} if name not in ignored]  # also unknown ones
    return Comparison(
        settings=_differing(one.config, other.config, settings),
        starting_point=_differing(start, other_start, STARTING_POINT),
        first=first,
        largest_relative=largest,
        num_steps=num_steps,
        last_steps=(_last_step(one), _last_step(other)),
        acc1=(_last_acc1(one), _last_acc1(other)),
        damage=[f"{run.name}: {phrase}" for run in (one, other) for phrase in run.damage()],
    )


def _matching_events(one: Run, other: Run) -> Iterator[tuple[Event, Event]]:
    """Yield pairs of events of the same kind at the same step; both files are streamed, not held in memory."""
    other_events = _metric_events(other)
    other_event = next(other_events, None)
    for event in _metric_events(one):
        while other_event is not None and _position(other_event) < _position(event):
            other_event = next(other_events, None)
        if other_event is None:
            return
        if _position(other_event) == _position(event):
            yield event, other_event


def _metric_events(run: Run) -> Iterator[Event]:
    """Yield training and evaluation events in order; an evaluation follows the training event of its step."""
    latest = (-1, False)
    for event in run.events():
        if event["event"] in METRICS and _position(event) > latest:
            latest = _position(event)
            yield event


def _value(event: Event, metric: str) -> Any:
    return event.get(metric, event.get("scalars", {}).get(metric))


def _position(event: Event) -> tuple[int, bool]:
    return event["step"], event["event"] == "eval"


def _last_step(run: Run) -> int:
    return max((events[-1]["step"] for events in map(run.events, METRICS) if events), default=0)


def _relative(one: Any, other: Any) -> float:
    """The relative difference: 0 if the values are equal or both missing; infinite if only one is missing."""
    if one == other:
        return 0.0
    if one is None or other is None:
        return float("inf")
    return abs(one - other) / max(abs(one), abs(other))


def _differing(one: dict[str, Any], other: dict[str, Any], names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def _last_acc1(run: Run) -> float | None:
    return next((event["acc1"] for event in reversed(run.events("eval"))), None)


def as_text(comparison: Comparison) -> str:
    """The result in a few lines of text."""
    lines = [
        f"settings: {_format_pairs(comparison.settings)}",
        f"starting point: {_format_pairs(comparison.starting_point)}",
    ]
    if comparison.first is not None:
        step, event, metric, (one, other), relative = comparison.first
        where = "evaluation at" if event == "eval" else "training"
        lines.append(f"first difference: {where} step {step}, {metric} {one} vs. {other} (relative {relative:.1e})")
        lines.append(f"largest relative difference of the loss: {comparison.largest_relative:.1e}")
    elif comparison.num_steps:
        lines.append(f"no difference in the {comparison.num_steps} steps that both runs logged")
    else:
        lines.append("no logged step in common; run both with the same --print-freq")
    if comparison.last_steps[0] != comparison.last_steps[1]:
        lines.append(f"the runs end at different steps: {comparison.last_steps[0]} and {comparison.last_steps[1]}")
    accuracies = ["none" if acc1 is None else f"{acc1:.2f} %" for acc1 in comparison.acc1]
    lines.append(f"top-1 at the last evaluation: {accuracies[0]} and {accuracies[1]}")
    lines += comparison.damage
    return "\n".join(lines)


def _format_pairs(differing: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {one} vs. {other}" for name, (one, other) in differing.items()) or "the same"
