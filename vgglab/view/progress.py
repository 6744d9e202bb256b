"""The progress of a run and its remaining time, computed from the events alone."""

from __future__ import annotations

from typing import Any


class Progress:
    """The progress of a run; call ``add`` with the events in order.

    Attributes:
        activity: what the run is doing, e.g. ``epoch 2 of 6``.
        step, num_steps: optimizer steps done and in total, including those before a resume.
        eta_seconds: estimated time left, including evaluations once one has ended; None before the first step.
        train, eval: the latest event of each kind, or empty.
        status: ``starting``, ``running``, ``done``, ``interrupted`` or ``failed``.
    """

    def __init__(self) -> None:
        self.activity = "starting"
        self.status = "starting"
        self.step = self.num_steps = 0
        self.eta_seconds: float | None = None
        self.train: dict[str, Any] = {}
        self.eval: dict[str, Any] = {}
        self._start: dict[str, Any] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Update from one event; unknown kinds are ignored."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_start(self, event: dict[str, Any]) -> None:
        self._start, self.status = event, "running"
        self.step, self.num_steps = event["first_step"], event["num_steps"]
        self.activity = f"epoch {min(event['first_epoch'] + 1, event['epochs'])} of {event['epochs']}"

    def _on_train(self, event: dict[str, Any]) -> None:
        self.train, self.step = event, event["step"]
        if not self._start:  # logged before the run was resumed; the start event that counts comes later
            self.activity = f"epoch {event['epoch'] + 1}"
            return
        self.activity = f"epoch {event['epoch'] + 1} of {self._start['epochs']}"
        done = self.step - self._start["first_step"]
        if done > 0:
            per_step = (event["seconds"] - self._start["seconds"]) / done
            self.eta_seconds = per_step * (self.num_steps - self.step)

    def _on_eval_start(self, event: dict[str, Any]) -> None:
        self.activity = "evaluating"

    def _on_eval(self, event: dict[str, Any]) -> None:
        self.eval, self.activity = event, "saving"

    def _on_end(self, event: dict[str, Any]) -> None:
        self.status = self.activity = event["status"]
        self.eta_seconds = None


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
