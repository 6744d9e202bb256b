"""How fast training steps are, each way beside a plain PyTorch loop in the same run.

    python -m vgglab.bench step                                      # VGG16, 224x224, the best device there is
    python -m vgglab.bench step --batch-size 8,16 --ways fast        # some batch sizes, one way
    python -m vgglab.bench step --against torchvision --json         # the last line of stdout is one JSON object

Images are made up once and lie ready, so loading is left out (``python -m vgglab.bench data`` measures that). Each way
and the plain loop are processes of their own that make steps in turns; a ratio is the median of the turns. The result
also goes into a run directory, as ``bench.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Sequence

from vgglab.bench.child import Way, work
from vgglab.config import MODELS, OneLineParser, parse, with_dashes
from vgglab.devices import DEVICE_CHOICES
from vgglab.errors import UserError
from vgglab.recording import RunWriter
from vgglab.runs import run_path, write_json

PLAIN = Way("plain", is_plain=True, is_prepared=False)
WAYS = {
    "float32": Way("float32"),
    "channels-last": Way("channels-last", ("--channels-last",)),
    "amp": Way("amp", ("--amp",)),
    "fast": Way("fast", ("--fast",)),
    "compile": Way("compile", ("--fast", "--compile")),
    # The plain loop in a process that the kit has set up: what is left between it and float32 is the engine.
    "bare": Way("bare", is_plain=True),
    "torchvision": Way("torchvision", is_plain=True, is_prepared=False, is_torchvisions=True),
}
USUAL = ("float32", "channels-last", "amp", "fast")


class StepFigures(NamedTuple):
    """One way beside the plain loop; images per second."""

    way: str
    batch_size: int
    images_per_second: float  # at the median step
    reference_images_per_second: float  # the plain loop, likewise
    ratio: float  # median over the turns
    ratio_range: tuple[float, float]
    num_turns: int
    peak_bytes: int | None
    device: dict[str, Any]  # what the device says of itself


class Child:
    """A process that steps when told to. Raises UserError where its way cannot be gone here."""

    def __init__(self, way: Way, flags: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, way, flags), daemon=True)
        self.process.start()
        other.close()
        self.way = way
        self.device = self._answer()

    def steps(self, number: int) -> list[float]:
        """Seconds of each."""
        self.connection.send(number)
        return self._answer()

    def stop(self) -> dict[str, Any]:
        """What it has used of the device."""
        self.connection.send(None)
        usage = self._answer()
        self.process.join()
        return usage

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise UserError(f"{self.way.name}: the process ended ({code}); is there memory for this batch?") from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer


def measure(flags: list[str], ways: Sequence[str], batch_size: int, turns: int, steps: int) -> list[StepFigures]:
    """Each way in turns with the plain loop; one step of each at first is warm-up.

    Raises:
        UserError: an unknown way, or one that this device does not offer.
    """
    flags = [*flags, f"--batch-size={batch_size}"]
    plain = Child(PLAIN, flags)
    plain.steps(1)
    results = []
    for name in ways:
        child = Child(WAYS[name], flags)
        child.steps(1)
        pairs = []
        for turn in range(turns):
            order = (plain, child) if turn % 2 else (child, plain)
            timed = {id(one): median(one.steps(steps)) for one in order}
            pairs.append((timed[id(child)], timed[id(plain)]))
        ratios = sorted(theirs / ours for ours, theirs in pairs)
        results.append(
            StepFigures(
                way=name,
                batch_size=batch_size,
                images_per_second=batch_size / median(ours for ours, _ in pairs),
                reference_images_per_second=batch_size / median(theirs for _, theirs in pairs),
                ratio=median(ratios),
                ratio_range=(ratios[0], ratios[-1]),
                num_turns=turns,
                device=child.device,
                peak_bytes=child.stop().get("peak_bytes"),
            )
        )
    plain.stop()
    return results


def as_text(results: Sequence[StepFigures]) -> str:
    """The figures for people."""
    lines = ["way             batch   images/s   plain loop   ratio (range)          peak memory"]
    for row in results:
        low, high = row.ratio_range
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB"
        lines.append(
            f"{row.way:15s}{row.batch_size:6d}{row.images_per_second:11.2f}{row.reference_images_per_second:13.2f}"
            f"   {row.ratio:.2f} ({low:.2f} to {high:.2f}){memory:>14s}"
        )
    return "\n".join(lines)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="vgglab.bench step",
        usage="python -m vgglab.bench step [--flag value ...]",
        description="How fast training steps are, each way beside a plain PyTorch loop in the same run.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", choices=MODELS, default="vgg16")
    parser.add_argument("--device", choices=DEVICE_CHOICES, default="auto")
    parser.add_argument("--image-size", default="224", help="side of the images (default 224)")
    parser.add_argument("--batch-size", default="16", help="one or several, e.g. 8,16,32 (default 16)")
    parser.add_argument("--ways", default=",".join(USUAL), help=f"of {', '.join(WAYS)} (default {','.join(USUAL)})")
    parser.add_argument("--against", choices=("torchvision",), help="torchvision's network in a plain loop, too")
    parser.add_argument("--turns", type=int, default=5, help="of each way and the plain loop (default 5)")
    parser.add_argument("--steps", type=int, default=1, help="in each turn (default 1)")
    parser.add_argument("--output-dir", default=".", help="the run directory is made in <this>/runs")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args([with_dashes(argument) for argument in argv])


def main(argv: Sequence[str]) -> None:
    """Measure, print, write. Raises UserError."""
    options = _options(argv)
    ways = [name.strip() for name in options.ways.split(",")] + ([options.against] if options.against else [])
    unknown = [name for name in ways if name not in WAYS]
    if unknown:
        raise UserError(f"--ways: no way {unknown[0]!r}; there are {', '.join(WAYS)}")
    sizes = options.batch_size.split(",")
    if not all(size.strip().isascii() and size.strip().isdigit() and int(size) > 0 for size in sizes):
        raise UserError(f"--batch-size: {options.batch_size!r} is not a number above 0, or several such as 8,16")
    if min(options.turns, options.steps) < 1:
        raise UserError("--turns, --steps: at least 1")
    flags = ["--data-path=fake", f"--model={options.model}", f"--device={options.device}", "--workers=0", "--epochs=1"]
    flags += [f"--image-size={options.image_size}", "--print-freq=1000000", "--dropout-rate=0.5", "--skip-steps=0"]
    config = parse([*flags, f"--output-dir={options.output_dir}"])
    config.data_path = "bench-step"
    results = []
    for size in sizes:
        results += measure(flags, ways, int(size), options.turns, options.steps)
    path = run_path(config)
    config.data_path = "fake"
    _write(path, config.as_dict(), results)
    print(as_text(results))
    print(f"run directory: {path}", flush=True)
    if options.json:
        best = max(results, key=lambda row: row.images_per_second)
        print(json.dumps({**best._asdict(), "all": [row._asdict() for row in results]}))


def _write(path: Path, config: dict[str, Any], results: Sequence[StepFigures]) -> None:
    device = dict(results[-1].device)
    run = RunWriter(path, is_simulated=device["simulated"])
    run.write_config(config)
    run.write_env(device, world_size=1)
    run.event("end", status="done", error=None)
    run.close()
    write_json(path / "bench.json", {"subject": "step", "results": [row._asdict() for row in results]})
