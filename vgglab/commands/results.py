"""``vgglab results``: compare runs in tables or on a web page; see ``vgglab/view/results.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from vgglab.commands import call
from vgglab.errors import UserError
from vgglab.settings.flags import OneLineParser
from vgglab.view.results import TITLE, as_html, as_text, collect, series_of

parser = OneLineParser(prog="vgglab results", description="Compare many runs in tables or on a web page.")
parser.add_argument("folder", nargs="*", type=Path, default=[Path("runs")], help="a run, or a folder of runs")
parser.add_argument("--html", type=Path, help="write a web page to this file instead of printing tables")


def main(argv: Sequence[str]) -> int:
    options = parser.parse_args(argv)
    results, series = collect(options.folder), series_of(options.folder)
    try:
        if options.html:
            _check_overwritable(options.html)
            options.html.write_text(as_html(results, series), encoding="utf-8")
            print(options.html)
        else:
            print(as_text(results, series))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    return 0


def _check_overwritable(file: Path) -> None:
    """Raise UserError if the file exists and is not a results page. Raises OSError if it cannot be read."""
    if file.exists() and TITLE not in file.read_text(encoding="utf-8", errors="replace")[:500]:
        raise UserError(f"--html {file}: already exists and is not a results page; choose another file name")


if __name__ == "__main__":
    raise SystemExit(call("results"))
