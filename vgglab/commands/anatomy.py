"""``vgglab anatomy``: a network layer by layer; see ``vgglab/lab/anatomy.py``."""

from __future__ import annotations

import json
import sys
from typing import Sequence

from vgglab.commands import call
from vgglab.devices import DEVICE_CHOICES
from vgglab.settings.choices import MODELS
from vgglab.settings.flags import AT_LEAST_1, SIZE, OneLineParser, with_dashes

parser = OneLineParser(
    prog="vgglab anatomy",
    description="Show a network layer by layer: shapes, parameters, operations, memory.",
)
parser.add_argument("--model", choices=MODELS, default="vgg16", help="the network (default vgg16)")
parser.add_argument(
    "--image-size", type=SIZE, default=224, help="height and width of the images, in pixels (default 224)"
)
parser.add_argument("--batch-size", type=AT_LEAST_1, default=1, help="images per batch (default 1)")
parser.add_argument("--num-classes", type=AT_LEAST_1, default=1000, help="number of classes (default 1000)")
parser.add_argument("--device", choices=DEVICE_CHOICES, default="cpu", help="device for --measure (default cpu)")
parser.add_argument(
    "--measure", action="store_true", help="time each layer, and measure the peak speeds of the machine"
)
parser.add_argument("--json", action="store_true", help="also print the result as one line of JSON")


def main(argv: Sequence[str]) -> int:
    options = parser.parse_args([with_dashes(argument) for argument in argv])
    from vgglab.lab.anatomy import measure, of

    anatomy = of(options.model, options.image_size, options.batch_size, options.num_classes)
    if options.measure:
        anatomy = measure(anatomy, options.device)
    print(anatomy)
    if options.json:
        print(json.dumps(anatomy.as_dict()))
    return 0


if __name__ == "__main__":
    raise SystemExit(call("anatomy"))
elif __name__ == "vgglab.anatomy":  # make ``import vgglab.anatomy`` and ``vgglab.anatomy`` the same module
    from vgglab.lab import anatomy

    sys.modules[__name__] = anatomy
