"""``vgglab data check``: find images that cannot be read; see ``vgglab/data/check.py``."""

from __future__ import annotations

import argparse
import json
from typing import Sequence

from vgglab.commands import call
from vgglab.dist import ranks
from vgglab.settings.flags import AT_LEAST_1, OneLineParser, with_dashes

parser = OneLineParser(
    prog="vgglab data",
    usage="vgglab data check PATH [--flag value ...]",
    description="Read every image of a data set once and list those that cannot be read.",
    epilog="Exit codes: 0 all images can be read; 1 some cannot; 2 bad input.",
)
parser.add_argument("what", choices=["check"], metavar="check", help=argparse.SUPPRESS)
parser.add_argument("path", metavar="PATH", help="a folder with train/ and val/, or the name of a data set")
parser.add_argument(
    "-j", "--workers", type=AT_LEAST_1, default=ranks.num_cores(), help="reader processes (default: one per core)"
)
parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def main(argv: Sequence[str]) -> int:
    options = parser.parse_args([with_dashes(argument) for argument in argv])
    from vgglab.data.check import check_images

    findings = check_images(options.path, options.workers)
    print(json.dumps(findings._asdict()) if options.json else findings)
    return 1 if findings.unreadable else 0


if __name__ == "__main__":
    raise SystemExit(call("data"))
