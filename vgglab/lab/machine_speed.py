"""Measure how much slower this machine is than the reference machine of the notebooks; takes about two seconds.

    >>> slowdown()
    1.0

A notebook spends part of its time in training steps and part in Python code that starts processes and imports torch. A
processor may be slow at only one of these, so both are measured: a training step of VGG11, and the compilation of a
standard-library source file to bytecode. Both use one core, because on a busy machine several threads would mostly
wait for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Callable

from vgglab.storage.cache import cache_folder

# The reference machine: its name, its two measurements, and the running time of each notebook with the profile `quick`
# and nothing else running. Written by python tests/time_notebooks.py "name of the machine".
REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("timings.json").read_text(encoding="utf-8"))
STEP_BENCHMARK_SECONDS, COMPILE_BENCHMARK_SECONDS = 1.2, 0.5
CACHE_SECONDS = 600.0  # how long a measurement is reused by all kernels on this machine


@lru_cache(maxsize=None)
def slowdown() -> float:
    """Return how many times slower this machine is than the reference machine; 3.0 means a third of its speed."""
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError):  # no HOME, no file, or an invalid file
        file = cache_folder() / "machine_speed.json"
        if 0 <= time.time() - file.stat().st_mtime < CACHE_SECONDS:
            return _ratio(*json.loads(file.read_text(encoding="utf-8")))
    seconds = measure()
    with contextlib.suppress(OSError, RuntimeError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        (cache_folder() / "machine_speed.json").write_text(json.dumps(seconds), encoding="utf-8")
    return _ratio(*seconds)


def _ratio(step_seconds: float, compile_seconds: float) -> float:
    return (step_seconds / REFERENCE["step_seconds"] * compile_seconds / REFERENCE["compile_seconds"]) ** 0.5


def measure() -> tuple[float, float]:
    """Return the median seconds of a training step and of compiling a Python file, each after a warm-up run."""
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    compile_seconds = _median_seconds(partial(compile, source, "argparse", "exec"), COMPILE_BENCHMARK_SECONDS)
    try:
        import torch
    except ImportError:  # 08_report can show copied runs on a machine without torch
        return REFERENCE["step_seconds"] * compile_seconds / REFERENCE["compile_seconds"], compile_seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):  # does not change the caller's random state
            return _median_seconds(_training_step(), STEP_BENCHMARK_SECONDS), compile_seconds
    finally:
        torch.set_num_threads(threads)


def _training_step() -> Callable[[], None]:
    import torch

    from vgglab.devices.compat import without_compiler
    from vgglab.model import build

    network = build("vgg11", num_classes=10, head="small")
    optimizer = without_compiler(torch.optim.SGD)(network.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _median_seconds(run: Callable[[], Any], min_seconds: float) -> float:
    run()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < min_seconds:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return median(seconds)
