"""The progress of a run and its remaining time, computed from the events alone."""

from __future__ import annotations

from typing import Any


class Progress:
    """The progress of a run; call ``add`` with the events in order.

    Attributes:
        activity: what the run is doing, e.g. ``epoch 2 of 6``.
        step, num_steps: optimizer steps done and in total, including those before a resume.
        eta_seconds: estimated time left, including evaluations once one has ended; None before the first step.
        start, train, eval: the latest event of each kind, or empty.
        status: ``starting``, ``running``, ``done``, ``interrupted`` or ``failed``.
    """

    def __init__(self) -> None:
        self.activity = self.status = "starting"
        self.step = self.num_steps = 0
        self.eta_seconds: float | None = None
        self.train: dict[str, Any] = {}
        self.eval: dict[str, Any] = {}
        self.start: dict[str, Any] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Update from one event; kinds that do not affect the progress are ignored."""
        kind = event["event"]
        if kind == "start":
            self.start, self.status = event, "running"
            self.step, self.num_steps = event["first_step"], event["num_steps"]
            self.activity = f"epoch {min(event['first_epoch'] + 1, event['epochs'])} of {event['epochs']}"
        elif kind == "train":
            self.train, self.step = event, event["step"]
            self.activity = f"epoch {event['epoch'] + 1}"
            if self.start:  # else logged before the run was resumed; the start event that counts comes later
                self.activity += f" of {self.start['epochs']}"
                num_done = self.step - self.start["first_step"]
                if num_done > 0:
                    seconds_per_step = (event["seconds"] - self.start["seconds"]) / num_done
                    self.eta_seconds = seconds_per_step * (self.num_steps - self.step)
        elif kind == "eval_start":
            self.activity = "evaluating"
        elif kind == "eval":
            self.eval, self.activity = event, "saving"
        elif kind == "end":
            self.status = self.activity = event["status"]
            self.eta_seconds = None

    def time_left(self) -> str:
        """The remaining time as text, or "" if there is no estimate."""
        return "" if self.eta_seconds is None else f"{duration(self.eta_seconds)} left"


def duration(seconds: float) -> str:
    """A duration as text: ``8 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def loss_text(value: float | None) -> str:
    """A loss as text; None, as in the events, means that it was not finite."""
    return "not finite" if value is None else f"{value:.4f}"
