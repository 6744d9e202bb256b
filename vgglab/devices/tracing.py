"""A profiler's trace of a few steps, for chrome://tracing or Perfetto: what ran when, on the host and on the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TRACE = "trace.json"


class Tracer:
    """Records ``num_steps`` steps after the first ``skip_steps`` of a run; with 0 it does nothing."""

    def __init__(self, folder: Path, skip_steps: int, num_steps: int) -> None:
        self._file = folder / TRACE
        self._skip_steps, self._num_steps = skip_steps, num_steps
        self._profiler: Any = None
        self._steps = 0
        if num_steps and skip_steps == 0:
            self._start()

    def step_has_ended(self) -> None:
        self._steps += 1
        if self._profiler is not None and self._steps == self._skip_steps + self._num_steps:
            self.close()
        elif self._num_steps and self._steps == self._skip_steps:
            self._start()

    def _start(self) -> None:
        self._profiler = torch.profiler.profile()  # all that this torch can record here
        self._profiler.__enter__()

    def close(self) -> None:
        """Write what there is, also of a run that ends early: a profiler that is left open takes the process down."""
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self._file))
            self._profiler = None
