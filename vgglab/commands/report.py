"""``vgglab report``: compute ``report.json`` from the events; see ``vgglab/runs/report.py``."""

from __future__ import annotations

from typing import Sequence

from vgglab.commands import call, print_error
from vgglab.errors import UserError, printable
from vgglab.runs.report import build_report
from vgglab.runs.run import Run
from vgglab.settings.flags import OneLineParser
from vgglab.storage.files import write_errors
from vgglab.storage.schema import write_document

parser = OneLineParser(prog="vgglab report", description="Compute the report.json of each run from its events.")
parser.add_argument("run", nargs="+", help="a run directory")


def main(argv: Sequence[str]) -> int:
    code = 0
    for path in parser.parse_args(argv).run:
        try:
            run = Run(path)
            file = run.path / "report.json"
            with write_errors(file):
                write_document(file, build_report(run, recompute=True))
            print(printable(str(file)))
        except UserError as error:  # the other runs may be intact
            print_error("report", error)
            code = 2
    return code


if __name__ == "__main__":
    raise SystemExit(call("report"))
