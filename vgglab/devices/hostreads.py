"""Find the lines where the host reads a value from the device, and so waits for all work submitted so far.

A single such read per step, for example a forgotten ``.item()``, leaves the device idle while the host prepares the
next step.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Callable

from torch import Tensor

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
PACKAGE = Path(__file__).parent.parent
# Reads in these files are attributed to their caller. Reads in the loader are ignored: its tensors are on the host.
TRANSPARENT_PATHS, LOADER_PATHS = (str(PACKAGE / "devices"), "/torch/"), str(PACKAGE / "data")


class HostReads:
    """Context manager that counts the reads by line of code: ``{"trainer.py:115": 3}``."""

    def __init__(self, device_is_host: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._device_is_host = device_is_host  # then reads of CPU tensors are counted, too

    def __enter__(self) -> HostReads:
        self._inherited = [name for name in READS if name not in vars(Tensor)]
        self._own = {name: vars(Tensor)[name] for name in READS if name in vars(Tensor)}
        for name in READS:
            setattr(Tensor, name, self._counted(getattr(Tensor, name)))
        return self

    def __exit__(self, *_: Any) -> None:
        for name in self._inherited:
            delattr(Tensor, name)
        for name, method in self._own.items():
            setattr(Tensor, name, method)

    def pop_counts(self) -> dict[str, int]:
        """Return the counts since the last call, and reset them."""
        counts, self.counts = dict(self.counts), Counter()
        return counts

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
            on_host = tensor.device.type == "cpu"
            if not on_host or (self._device_is_host and method.__name__ != "cpu"):
                location = _location(sys._getframe(1))
                if location:
                    self.counts[location] += 1
            return method(tensor, *args, **options)

        return counted


def _location(frame: FrameType | None) -> str:
    """Return ``file.py:line`` of the code that reads the value, or an empty string if that is the loader."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(LOADER_PATHS):
            return ""
        if not any(part in file for part in TRANSPARENT_PATHS):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
