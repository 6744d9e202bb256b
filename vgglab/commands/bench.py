"""``vgglab bench data`` and ``bench step``: speed of data loading and of training steps; see ``vgglab/lab/bench``."""

from __future__ import annotations

import json
from typing import Any, Sequence

from vgglab.commands import call
from vgglab.devices import DEVICE_CHOICES
from vgglab.errors import UserError
from vgglab.settings.choices import DECODERS, MODELS
from vgglab.settings.flags import AT_LEAST_1, OneLineParser, number, with_dashes
from vgglab.settings.parser import parse_flags

ABOVE_0 = number(float, 1e-12, 1e12, "a number above 0")

parser = OneLineParser(prog="vgglab bench", description="Measure speed and compare it with a reference.")
subjects = parser.add_subparsers(dest="subject", required=True, metavar="data|step", parser_class=OneLineParser)
data_parser = subjects.add_parser(
    "data",
    usage="vgglab bench data [--flag value ...]",
    description="Measure the speed of data loading against torchvision's reference pipeline.",
)
data_parser.add_argument("--data-path", default="digits", help="a folder or the name of a data set, as in vgglab train")
data_parser.add_argument("--image-size", type=int, help="crop size in pixels (default: that of the data set)")
data_parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default 32)")
data_parser.add_argument(
    "--decoder", choices=("auto", *DECODERS), default="auto", help="image decoder, as in vgglab train"
)
data_parser.add_argument("--workers", help="numbers of workers to try, e.g. 1,2,4 (default: 1, and one per core)")
data_parser.add_argument(
    "--seconds", type=ABOVE_0, default=20.0, help="approximate seconds for each measurement (default 20)"
)
data_parser.add_argument(
    "--card", type=ABOVE_0, help="training speed of your card in images/s, to compute how many workers it needs"
)
data_parser.add_argument("--json", action="store_true", help="also print the result as one line of JSON")

step_parser = subjects.add_parser(
    "step",
    usage="vgglab bench step [--flag value ...]",
    description="Measure the speed of training steps in each mode against a plain PyTorch loop.",
)
step_parser.add_argument("--model", choices=MODELS, default="vgg16")
step_parser.add_argument("--device", choices=DEVICE_CHOICES, default="auto")
step_parser.add_argument("--image-size", default="224", help="height and width of the images (default 224)")
step_parser.add_argument(
    "--batch-size", default="16", help="images per batch, e.g. 16 or 8,16,32; max: the most that fit (default 16)"
)
step_parser.add_argument("--ways", help="modes such as float32,fast; default: float32, channels-last, amp and fast")
step_parser.add_argument(
    "--against", choices=("torchvision",), help="also measure torchvision's network in a plain loop"
)
step_parser.add_argument(
    "--turns", type=AT_LEAST_1, default=5, help="repetitions of each mode and of the plain loop (default 5)"
)
step_parser.add_argument("--steps", type=AT_LEAST_1, default=1, help="steps per repetition (default 1)")
step_parser.add_argument("--output-dir", default=".", help="folder in which runs/<run> is created (default .)")
step_parser.add_argument("--json", action="store_true", help="also print the result as one line of JSON")


def main(argv: Sequence[str]) -> int:
    options = parser.parse_args([with_dashes(argument) for argument in argv])
    bench = bench_data if options.subject == "data" else bench_step
    bench(options)
    return 0


def _numbers(flag: str, text: str, advice: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() and int(word) > 0 for word in words):
        raise UserError(f"{flag}: {text!r} is invalid; give {advice}")
    return [int(word) for word in words]


def bench_data(options: Any) -> None:
    counts = None if options.workers is None else _numbers("--workers", options.workers, "numbers such as 1,2,4")
    flags = [f"--data-path={options.data_path}", f"--batch-size={options.batch_size}", f"--decoder={options.decoder}"]
    flags += [] if options.image_size is None else [f"--image-size={options.image_size}"]
    config = parse_flags(flags)
    from vgglab.lab.bench.data import as_text, measure_loading

    metrics = measure_loading(config, options.seconds, counts, options.card)
    print(as_text(metrics, options.data_path), flush=True)
    if options.json:
        print(json.dumps(metrics._asdict()))


def bench_step(options: Any) -> None:
    advice = "a number, several such as 8,16, or max"
    sizes = None if options.batch_size == "max" else _numbers("--batch-size", options.batch_size, advice)
    flags = [f"--model={options.model}", f"--device={options.device}", f"--image-size={options.image_size}"]
    parse_flags(flags)
    from vgglab.lab.bench.step import DEFAULT_MODES, as_text, find_largest_batch, get_mode, measure_steps, save_steps

    modes = [name.strip() for name in options.ways.split(",")] if options.ways else list(DEFAULT_MODES)
    modes += [options.against] if options.against else []
    for name in modes:
        get_mode(name)
    if sizes is None:
        results = [find_largest_batch(flags, mode, options.turns, options.steps) for mode in dict.fromkeys(modes)]
    else:
        results = [row for size in sizes for row in measure_steps(flags, modes, size, options.turns, options.steps)]
    path = save_steps(results, flags, options.output_dir)
    print(as_text(results))
    print(f"run directory: {path}", flush=True)
    if options.json:
        best = max(results, key=lambda row: row.images_per_second)
        print(json.dumps({**best._asdict(), "all": [row._asdict() for row in results]}))


if __name__ == "__main__":
    raise SystemExit(call("bench"))
