"""Profile a few steps and write a trace for chrome://tracing or Perfetto: what ran when, on host and card."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import torch

TRACE = "trace.json"


@contextmanager
def tracing(folder: Path, skip_steps: int, num_steps: int) -> Iterator[Callable[[], None]]:
    """Context manager that traces ``num_steps`` steps after the first ``skip_steps``; none if ``num_steps`` is 0.

    Its value is a function to call after each step. The trace is written even if the run ends early: an open profiler
    would crash the process.
    """
    if num_steps == 0:
        yield lambda: None
        return

    action, last_step = torch.profiler.ProfilerAction, skip_steps + num_steps - 1

    def schedule(step: int) -> Any:  # like torch.profiler.schedule, which warns if there is no step to warm up
        if skip_steps <= step < last_step:
            return action.RECORD
        return action.RECORD_AND_SAVE if step == last_step else action.NONE

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / TRACE))

    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:  # of all supported activities
        yield profiler.step
