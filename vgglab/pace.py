"""Timing of the training loop, and stopping all ranks after the same step."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from vgglab.devices.hostreads import HostReads

if TYPE_CHECKING:
    from vgglab.devices.base import Device
    from vgglab.runs.writer import RankWriter
    from vgglab.settings.config import Settings
    from vgglab.trainer import Trainer

SYNC_SECONDS = 5.0  # with several ranks, the approximate time between checks for a request to stop


PHASES = ("data", "copy", "forward", "backward", "all_reduce", "optimizer", "host")


class Clock:
    """Measures the interval from one log line to the next. Read it only after synchronising the device.

    Each step is timestamped on the device, without waiting for it. With ``has_phases``, the phases of a step are
    timestamped too (``TimedDevice`` reports most of them), and reads from the device are counted.
    """

    def __init__(self, images_per_step: int, device: Device, process_started: float, has_phases: bool = False) -> None:
        self.images_per_step, self.has_phases = images_per_step, has_phases
        self._process_started: float | None = process_started  # by time.monotonic(); None after the first interval
        self._device = device
        self._reads = HostReads(device_is_host=device.is_host)
        self.restart()

    def restart(self) -> None:
        self._reads.pop_counts()  # those of an evaluation or a checkpoint belong to no step
        self.started, self.steps = time.perf_counter(), 0
        self.data_seconds = 0.0
        self.own_seconds = 0.0  # before the backward pass, in which the ranks wait for one another
        self._wait_started = 0.0
        self._marks = [self._device.mark()]  # the start, then the end of each step
        self._phases: list[tuple[str, Any]] = [("", self._marks[0])]

    def batches(self, batches: Iterable[Any], num_done: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield each batch with its number, counted from ``num_done`` + 1, and add up the time spent waiting for it."""
        iterator = iter(batches)
        with self._reads if self.has_phases else nullcontext():
            for number in count(num_done + 1):
                wait_started = time.perf_counter()
                batch = next(iterator, None)
                if batch is None:
                    return
                self._wait_started = wait_started
                self.data_seconds += time.perf_counter() - wait_started
                self.steps += 1
                self.end_phase("data")
                yield number, batch

    def end_phase(self, phase: str) -> None:
        """Record the end of ``phase``."""
        if self.has_phases:
            self._phases.append((phase, self._device.mark()))

    def end_own_work(self) -> None:
        """Record that this rank has done its own work (loading, copying, forward pass) and now waits for the others."""
        self.own_seconds += time.perf_counter() - self._wait_started

    def end_step(self) -> None:
        self.end_phase("optimizer")
        self._marks.append(self._device.mark())

    def own_metrics(self) -> dict[str, Any]:
        """Return this rank's own times in the interval, to find the rank that the others wait for."""
        return {
            "interval_steps": self.steps,
            "own_seconds": self.own_seconds,
            "data_seconds": self.data_seconds,
            "interval_seconds": time.perf_counter() - self.started,
        }

    def read_interval(self) -> dict[str, Any]:
        """Return the metrics of the interval that ends now, and start the next one."""
        seconds = time.perf_counter() - self.started
        num_images = self.steps * self.images_per_step
        seconds_between = self._device.seconds_between
        interval: dict[str, Any] = {
            "images_per_second": num_images / seconds,
            "interval_images": num_images,
            "interval_steps": self.steps,
            "interval_seconds": seconds,
            "data_seconds": self.data_seconds,
        }
        if self._device.times_steps:
            step_seconds = [round(seconds_between(*pair), 7) for pair in zip(self._marks, self._marks[1:])]
            interval["step_seconds"] = step_seconds
            if self._process_started is not None:
                interval["first_step_seconds"] = time.monotonic() - self._process_started - sum(step_seconds[1:])
                self._process_started = None
        if self.has_phases:
            phase_seconds = dict.fromkeys(PHASES, 0.0)
            for (_, before), (phase, after) in zip(self._phases, self._phases[1:]):
                phase_seconds[phase] += seconds_between(before, after)
            phase_seconds["host"] += max(0.0, seconds - sum(phase_seconds.values()))  # time that belongs to no phase
            interval.update(phase_seconds=phase_seconds, host_reads=self._reads.pop_counts())
        self.restart()
        return interval


class TimedDevice:
    """Wraps a device, forwards all calls to it, and reports phases of each training step to a clock."""

    def __init__(self, device: Device, clock: Clock) -> None:
        self._device, self._clock = device, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context manager for the forward pass and the loss; reports the end of the phases ``copy`` and ``forward``."""
        self._clock.end_phase("copy")
        with self._device.autocast():
            yield
        self._clock.end_phase("forward")
        self._clock.end_own_work()  # from here on the ranks wait for one another

    def backward(self, loss: Tensor) -> None:
        self._device.backward(loss)
        self._clock.end_phase("backward")

    def average_gradients(self, model: nn.Module) -> None:
        self._device.average_gradients(model)
        self._clock.end_phase("all_reduce")


class StopCoordinator:
    """Makes all ranks stop after the same step: they communicate at log lines, and every few seconds in between.

    If one rank stopped alone, the others would wait for it forever. A run with one rank checks after every step.
    """

    should_stop = False

    def __init__(self, device: Device, stop_requested: Callable[[], bool]) -> None:
        """``stop_requested`` returns whether this rank was asked to stop."""
        self._device, self._stop_requested = device, stop_requested
        self._steps_per_sync = 1  # communicate after the first step, to learn how long a step takes
        self._steps = 0
        self._last_sync = time.perf_counter()

    def is_due(self) -> bool:
        """Whether the ranks should communicate after this step; the same on every rank."""
        self._steps += 1
        if self._device.world_size == 1:
            return self._stop_requested()
        return self._steps >= self._steps_per_sync

    def sync(self, metrics: Tensor) -> tuple[list[float], list[float]]:
        """Set ``should_stop``; return the means of ``metrics (n,)`` over the ranks, and this rank's own values."""
        device = self._device
        seconds = (time.perf_counter() - self._last_sync) / max(self._steps, 1)
        state = torch.tensor([float(self._stop_requested()), seconds]).to(metrics.device)
        values = device.fetch(torch.cat([device.sum(torch.cat([state, metrics])) / device.world_size, metrics]))
        stop_fraction, mean_seconds = values[:2]
        self.should_stop = stop_fraction > 0
        self._steps_per_sync = max(1, int(SYNC_SECONDS / max(mean_seconds, 1e-6)))
        self._steps, self._last_sync = 0, time.perf_counter()
        return values[2 : 2 + len(metrics)], values[2 + len(metrics) :]


class Pace:
    """What ``Trainer.fit`` needs around its steps: their timing, and when all ranks stop."""

    def __init__(self, config: Settings, device: Device, run: RankWriter) -> None:
        images_per_step = config.batch_size * device.world_size
        self.clock = Clock(images_per_step, device, run.process_started, config.timers)
        self.coordinator = StopCoordinator(device, run.stop_requested)

    @contextmanager
    def timing_phases(self, trainer: Trainer) -> Iterator[None]:
        """Context manager in which the device reports phases of each step to the clock (see ``TimedDevice``)."""
        device = trainer.device
        trainer.device = TimedDevice(device, self.clock)  # type: ignore[assignment]  # forwards everything else
        try:
            yield
        finally:
            trainer.device = device
