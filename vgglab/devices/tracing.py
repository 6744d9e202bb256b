"""Profile a few steps and write a trace for chrome://tracing or Perfetto: what ran when, on host and card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TRACE = "trace.json"


class Tracer:
    """Traces ``num_steps`` steps after the first ``skip_steps`` of a run; does nothing if ``num_steps`` is 0."""

    def __init__(self, folder: Path, skip_steps: int, num_steps: int) -> None:
        self._file = folder / TRACE
        self._skip_steps, self._num_steps = skip_steps, num_steps
        self._profiler: Any = None
        self._steps = 0
        if num_steps and skip_steps == 0:
            self._start()

    def end_step(self) -> None:
        self._steps += 1
        if self._profiler is not None and self._steps == self._skip_steps + self._num_steps:
            self.close()
        elif self._num_steps and self._steps == self._skip_steps:
            self._start()

    def _start(self) -> None:
        self._profiler = torch.profiler.profile()  # by default it records all supported activities
        self._profiler.__enter__()

    def close(self) -> None:
        """Stop profiling and write the trace, even if the run ends early: an open profiler would crash the process."""
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self._file))
            self._profiler = None
