"""``vgglab compare``: where two runs first differ; see ``vgglab/runs/compare.py``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Sequence

from vgglab.commands import call
from vgglab.errors import UserError
from vgglab.runs.compare import as_text, compare_runs
from vgglab.runs.run import Run
from vgglab.settings.flags import NOT_NEGATIVE, OneLineParser, with_dashes
from vgglab.storage.schema import finite


def parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="vgglab compare",
        description="Where two runs first differ.",
        epilog="Exit codes: 0 the same; 1 they differ; 2 bad input.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--tolerance", type=NOT_NEGATIVE, default=0.0, help="relative difference that is none (default 0)"
    )
    parser.add_argument("--png", type=Path, help="draw both runs into this file")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args([with_dashes(argument) for argument in argv])
    one, other = map(Run, options.runs)
    found = compare_runs(one, other, options.tolerance)
    if options.png:
        from vgglab.view.figures import curves_beside

        step = None if found.first is None else found.first.step
        _write_new(options.png, curves_beside([one, other], first_difference=step).png())
    print(as_text(found))
    if options.json:
        figures = {name: finite(value) for name, value in found._asdict().items()}
        first = found.first and {name: finite(value) for name, value in found.first._asdict().items()}
        print(json.dumps({**figures, "first": first, "is_same": found.is_same}))
    return 0 if found.is_same else 1


def _write_new(file: Path, content: bytes) -> None:
    """Raises UserError where the file is there already, cannot be written, or is called something else."""
    if file.suffix.lower() != ".png":
        raise UserError(f"--png {file}: a picture is written as PNG; let the name end in .png")
    try:
        with file.open("xb") as target:
            target.write(content)
    except OSError as error:
        raise UserError(f"--png {file}: {error.strerror}; name a new file") from None


if __name__ == "__main__":
    sys.exit(call("compare"))
