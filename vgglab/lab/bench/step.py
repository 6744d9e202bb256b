"""Measure the speed of training steps in each mode against a plain PyTorch loop in the same run.

    python -m vgglab.bench step                                      # VGG16, 224x224, the best device available
    python -m vgglab.bench step --batch-size 8,16 --ways fast        # two batch sizes, one mode
    python -m vgglab.bench step --batch-size max --ways fast         # the largest batch that fits
    python -m vgglab.bench step --against torchvision --json         # the last line of stdout is one JSON object

The images are generated once and kept in memory, so loading is not included (``python -m vgglab.bench data`` measures
it). Each mode and the plain loop run in separate processes with interleaved steps; a ratio is the median over the
repetitions. The share of peak is the achieved FLOP/s divided by the FLOP/s of a matrix product with the same precision
in the same process. The result is also written to a run directory, as ``bench.json``.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Sequence

from vgglab.errors import UserError
from vgglab.lab import anatomy
from vgglab.lab.bench.child import Failure, Mode, Network, Ready, serve
from vgglab.lab.shapes import shapes_only
from vgglab.runs.run import run_path
from vgglab.runs.writer import RunWriter
from vgglab.settings.parser import parse_flags
from vgglab.storage.schema import write_document

PLAIN = Mode("plain", is_plain=True, is_prepared=False)
MODES = {
    "float32": Mode("float32"),
    "channels-last": Mode("channels-last", ("--channels-last",)),
    "amp": Mode("amp", ("--amp",)),
    "tf32": Mode("tf32", ("--tf32",)),
    "fast": Mode("fast", ("--fast",)),
    "compile": Mode("compile", ("--fast", "--compile")),
    # A plain loop with vgglab's process settings; the difference from float32 is the cost or gain of Trainer.step.
    "bare": Mode("bare", is_plain=True),
    "torchvision": Mode("torchvision", is_plain=True, is_prepared=False, uses_torchvision=True),
}
DEFAULT_MODES = ("float32", "channels-last", "amp", "fast")
FLAGS = (
    "--data-path=fake",
    "--workers=0",
    "--epochs=1",
    "--print-freq=1000000",
    "--dropout-rate=0.5",
    "--skip-steps=0",
)
CONTEXT = multiprocessing.get_context("spawn")  # each process is a fresh interpreter that inherits no state
INITIAL_SIZE, LARGEST_SIZE, TOLERANCE = 16, 2**16, 1 / 16  # start, limit and tolerance of the largest-batch search


class DoesNotFit(UserError):
    """The batch does not fit into the memory of the device."""


class StepResult(NamedTuple):
    """The speed of one mode and, if both fit into memory, of the plain loop, in images per second."""

    way: str
    batch_size: int
    images_per_second: float  # from the median step time
    reference_images_per_second: float | None  # of the plain loop; None if this mode ran alone
    ratio: float | None  # median over the repetitions
    ratio_range: tuple[float, float] | None
    num_turns: int
    flop_per_image: int  # forward and backward, counted from the shapes
    peak_flop_per_second: float | None  # of a matrix product in this precision; None for a simulated card
    share_of_peak: float | None
    peak_bytes: int | None  # peak memory
    device: dict[str, Any]  # from device.describe()


class Child:
    """A process that performs steps on request. Raises UserError (mode unavailable) or DoesNotFit (out of memory)."""

    def __init__(self, mode: Mode, flags: Sequence[str]) -> None:
        self.connection, child_connection = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(child_connection, mode, list(flags)), daemon=True)
        self.process.start()
        child_connection.close()
        self.mode, self._peaks = mode, [0.0]
        self.ready: Ready = self._answer()

    def steps(self, number: int) -> list[float]:
        """Perform this many steps and return the seconds of each."""
        self.connection.send(number)
        return self._answer()

    def warm_up(self) -> None:
        """Perform the first steps, which are slower than the later ones."""
        self.steps(self.ready.num_warm_up_steps)

    def measure_peak(self) -> None:
        """Measure the speed of a matrix product; the maximum is used, because other load can only slow it down."""
        if not self.ready.device["simulated"]:
            self.connection.send("peak")
            self._peaks.append(self._answer())

    def stop(self) -> dict[str, Any]:
        """End the process and return its device usage."""
        self.connection.send(None)
        usage = self._answer()
        self.process.join()
        return usage

    def finish(self, batch_size: int, mode_seconds: Sequence[float], plain_seconds: Sequence[float] = ()) -> StepResult:
        """End the process and return the result; ``plain_seconds``: step times of the plain loop."""
        rate = batch_size / median(mode_seconds)
        ratios = sorted(plain / mode for mode, plain in zip(mode_seconds, plain_seconds))
        peak = max(self._peaks) or None
        flop = _training_flop(self.ready.network)
        return StepResult(
            way=self.mode.name,
            batch_size=batch_size,
            images_per_second=rate,
            reference_images_per_second=batch_size / median(plain_seconds) if plain_seconds else None,
            ratio=median(ratios) if ratios else None,
            ratio_range=(ratios[0], ratios[-1]) if ratios else None,
            num_turns=len(mode_seconds),
            flop_per_image=flop,
            peak_flop_per_second=peak,
            share_of_peak=rate * flop / peak if peak else None,
            peak_bytes=self.stop().get("peak_bytes"),
            device=self.ready.device,
        )

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):  # reset: it died before reading a request
            self.process.join()
            code = self.process.exitcode or 0
            if code < 0:  # killed by a signal, probably by the OOM killer
                raise DoesNotFit(f"{self.mode.name}: its process was killed, probably because memory ran out") from None
            raise RuntimeError(f"{self.mode.name}: its process failed; see the error above") from None
        if isinstance(answer, Failure):
            self.process.join()
            raise (DoesNotFit if answer.out_of_memory else UserError)(answer.reason)
        return answer


@lru_cache(maxsize=None)
def _training_flop(network: Network) -> int:
    """Return the FLOP of the forward and backward pass for one image; cached, because torchvision's import is slow."""
    with shapes_only():
        network_without_weights = network.build(init_weights=False)  # drawing them would import torch's compiler
    return anatomy.of(network_without_weights, network.image_size).training_flop


def get_mode(name: str) -> Mode:
    if name not in MODES:
        raise UserError(f"--ways: unknown mode {name!r}; choose from {', '.join(MODES)}")
    return MODES[name]


def measure_steps(
    flags: Sequence[str], ways: Sequence[str], batch_size: int, turns: int, steps: int
) -> list[StepResult]:
    """Time each mode interleaved with the plain loop, after one warm-up step (five on a card).

    Args:
        flags: training flags, such as ``--model=vgg11``; the benchmark adds its own, such as ``--data-path=fake``.
        ways: the modes, by their names in ``MODES``.
        turns: number of repetitions of each mode and of the plain loop.
        steps: steps per repetition; their median is used.

    Raises:
        UserError: an unknown mode, or one that the device does not support.
        DoesNotFit: the batch does not fit into memory.
    """
    modes = [get_mode(name) for name in dict.fromkeys(ways)]
    flags = [*flags, *FLAGS, f"--batch-size={batch_size}"]
    plain = Child(PLAIN, flags)
    plain.warm_up()
    results = []
    for mode in modes:
        child = Child(mode, flags)
        child.warm_up()
        mode_seconds: list[float] = []
        plain_seconds: list[float] = []
        for turn in range(turns):
            for process, seconds in ((plain, plain_seconds), (child, mode_seconds))[:: 1 if turn % 2 else -1]:
                seconds.append(median(process.steps(steps)))
            child.measure_peak()
        results.append(child.finish(batch_size, mode_seconds, plain_seconds))
    plain.stop()
    return results


def find_largest_batch(flags: Sequence[str], mode: str, turns: int, steps: int) -> StepResult:
    """Find the largest batch that fits, to within 1/16, and measure its speed with nothing else on the device.

    Each attempt runs two steps in a separate process, because the optimizer's state is only allocated in the first
    step.

    Raises:
        UserError: an unknown or unsupported mode, or out of memory even for a single image.
    """
    fits, too_large = 0, LARGEST_SIZE + 1
    while too_large - fits > max(1, fits * TOLERANCE):
        has_failed = too_large <= LARGEST_SIZE
        size = (fits + too_large) // 2 if has_failed else min(2 * fits or INITIAL_SIZE, LARGEST_SIZE)
        try:
            _start_alone(flags, mode, size).stop()
            fits = size
        except DoesNotFit:
            too_large = size
    if fits == 0:
        raise UserError(f"{mode}: out of memory even for a single image")
    while True:
        try:
            child = _start_alone(flags, mode, fits)
            seconds = [median(child.steps(steps)) for _ in range(turns)]
            child.measure_peak()
            return child.finish(fits, seconds)
        except DoesNotFit:  # so close to the limit that the same batch does not always fit
            if fits == 1:
                raise
            fits -= max(1, int(fits * TOLERANCE))


def _start_alone(flags: Sequence[str], mode: str, batch_size: int) -> Child:
    child = Child(get_mode(mode), [*flags, *FLAGS, f"--batch-size={batch_size}"])
    try:
        child.steps(2)
    except UserError:
        child.process.kill()
        raise
    return child


def as_text(results: Sequence[StepResult]) -> str:
    """Return the results as text."""
    lines = ["mode            batch   images/s   plain loop   ratio (range)         peak memory       share of peak"]
    for row in results:
        versus = f"{'':13s}   {'alone':19s}"
        if row.reference_images_per_second and row.ratio and row.ratio_range:
            low, high = row.ratio_range
            versus = f"{row.reference_images_per_second:13.2f}   {f'{row.ratio:.2f} ({low:.2f} to {high:.2f})':19s}"
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB"
        share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
        lines.append(f"{row.way:15s}{row.batch_size:6d}{row.images_per_second:11.2f}{versus}{memory:>14s}{share:>20s}")
    if any(row.ratio is None for row in results):
        lines.append(f"the largest batch that fits, to within {TOLERANCE:.0%}; it leaves no memory for a plain loop")
    return "\n".join(lines)


def save_steps(results: Sequence[StepResult], flags: Sequence[str], output_dir: str = ".") -> Path:
    """Write the results to a new run directory under ``output_dir``, where ``vgglab results`` finds them."""
    device = results[-1].device
    request = parse_flags([*flags, *FLAGS, f"--output-dir={output_dir}"])
    request = replace(request, device=device["device"])  # what auto selected
    path = run_path(replace(request, data_path="bench-step"))
    run = RunWriter(path, is_simulated=device["simulated"])
    run.write_settings(request.as_dict(), device, world_size=1)
    run.event("end", status="done", error=None)
    run.close()
    write_document(path / "bench.json", {"subject": "step", "results": [row._asdict() for row in results]})
    return path
