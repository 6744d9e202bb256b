"""``vgglab compare``: where two runs first differ; see ``vgglab/runs/compare.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

from vgglab.commands import call
from vgglab.errors import UserError
from vgglab.runs.compare import Comparison, as_text, compare_runs
from vgglab.runs.run import Run
from vgglab.settings.flags import NON_NEGATIVE, OneLineParser, with_dashes
from vgglab.storage.schema import finite_or_none

parser = OneLineParser(
    prog="vgglab compare",
    description="Find the first difference between the first run and each of the others.",
    epilog="Exit codes: 0 the runs are the same; 1 they differ; 2 bad input.",
)
parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, at least two")
parser.add_argument("--tolerance", type=NON_NEGATIVE, default=0.0, help="relative difference to ignore (default 0)")
parser.add_argument("--png", type=Path, help="plot the curves of all runs, and save them as this PNG file")
parser.add_argument("--json", action="store_true", help="also print the result as one line of JSON")


def main(argv: Sequence[str]) -> int:
    options = parser.parse_args([with_dashes(argument) for argument in argv])
    one, *others = map(Run, options.runs)
    if not others:
        raise UserError("RUN: give at least two run directories")
    comparisons = [compare_runs(one, other, options.tolerance) for other in others]
    if options.png:
        from vgglab.view.figures import curves_beside

        first = comparisons[0].first if len(others) == 1 else None
        _write_new(options.png, curves_beside([one, *others], first_difference=first and first.step).png())
    for other, comparison in zip(others, comparisons):
        print(as_text(comparison) if len(others) == 1 else f"{one.name} and {other.name}\n{as_text(comparison)}\n")
    if options.json:
        objects = [_as_json(comparison) for comparison in comparisons]
        print(json.dumps(objects[0] if len(others) == 1 else objects))
    return 0 if all(comparison.is_same for comparison in comparisons) else 1


def _as_json(comparison: Comparison) -> dict[str, Any]:
    first = comparison.first and comparison.first._asdict()
    return {**finite_or_none(comparison._asdict()), "first": finite_or_none(first), "is_same": comparison.is_same}


def _write_new(file: Path, content: bytes) -> None:
    """Write the figure. Raises UserError if the file exists, cannot be written, or does not end in ``.png``."""
    if file.suffix.lower() != ".png":
        raise UserError(f"--png {file}: the file name must end in .png")
    try:
        with file.open("xb") as target:
            target.write(content)
    except OSError as error:
        raise UserError(f"--png {file}: {error.strerror}; choose a new file name") from None


if __name__ == "__main__":
    raise SystemExit(call("compare"))
