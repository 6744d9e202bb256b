"""``vgglab anatomy``: a network layer by layer; see ``vgglab/lab/anatomy.py``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Sequence

from vgglab.commands import call
from vgglab.settings.flags import OneLineParser, with_dashes
from vgglab.settings.parser import parse_flags

OPTIONS = {  # name: (default, help); the training parser validates the values
    "model": ("vgg16", "the network"),
    "image-size": (224, "height and width of the images, in pixels"),
    "batch-size": (1, "images per batch"),
    "num-classes": (1000, "number of classes"),
    "device": ("cpu", "device for --measure"),
}


def parser() -> argparse.ArgumentParser:
    about = "Show a network layer by layer: shapes, parameters, operations, memory."
    parser = OneLineParser(prog="vgglab anatomy", description=about, allow_abbrev=False)
    for name, (default, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})")
    parser.add_argument(
        "--measure", action="store_true", help="time each layer, and measure the peak speeds of the machine"
    )
    parser.add_argument("--json", action="store_true", help="also print the result as one line of JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args([with_dashes(argument) for argument in argv])
    flags = parse_flags([f"--{name}={getattr(options, name.replace('-', '_'))}" for name in OPTIONS])
    assert flags.image_size
    assert flags.num_classes
    from vgglab.lab.anatomy import measure, of

    anatomy = of(flags.model, flags.image_size, flags.batch_size, flags.num_classes)
    if options.measure:
        anatomy = measure(anatomy, flags.device)
    print(anatomy)
    if options.json:
        print(json.dumps(anatomy.as_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(call("anatomy"))
elif __name__ == "vgglab.anatomy":  # make ``import vgglab.anatomy`` and ``vgglab.anatomy`` the same module
    from vgglab.lab import anatomy

    sys.modules[__name__] = anatomy
