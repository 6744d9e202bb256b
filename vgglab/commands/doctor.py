"""Check this machine, its devices and the installation of vgglab: ``python -m vgglab.doctor [--json]``.

It works even if the installation is broken. Exit codes: 0 no problems, 1 problems found, 2 unknown flag.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any, Sequence

from vgglab.commands import call
from vgglab.settings.flags import OneLineParser
from vgglab.version import __version__
from vgglab.view.tables import html_facts, html_text


@dataclass
class Diagnosis:
    """The result of a check of this machine.

    It has ``facts`` by name, ``problems`` with a ``fix`` for each, and ``notes`` about harmless findings.
    """

    facts: dict[str, Any]
    problems: list[dict[str, str]]
    notes: list[str]

    def rows(self) -> list[tuple[str, str]]:
        """Return the name and value of every fact, as text."""
        return [(name, _format(value)) for name, value in self.facts.items()]

    def __str__(self) -> str:
        width = max(len(name) for name in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows()]
        for item in self.problems:
            lines += ["", f"PROBLEM  {item['problem']}", f"    fix  {item['fix']}"]
        lines += ["", *(f"note  {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        number = len(self.problems)
        return "no problems found" if not number else f"{number} problem{'s' * (number > 1)} found"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = self.rows()
        for item in self.problems:
            rows += [("PROBLEM", item["problem"]), ("fix", item["fix"])]
        rows += [("note", note) for note in self.notes]
        return html_facts(rows) + html_text(self.verdict())


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(sorted(set(value)))}" if value else "none"
    if isinstance(value, dict):
        return "  ".join(f"{name}={text}" for name, text in value.items()) or "none"
    return "none" if value is None else str(value)


def check_machine() -> Diagnosis:
    """Check this machine. Takes several seconds, because each library is imported in a separate process."""
    from vgglab.devices.checkup import Checkup

    checkup = Checkup()
    checkup.facts.update(
        {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
            "python": f"{platform.python_version()} ({sys.executable})",
            "vgglab": __version__,
            "several ranks": "--nproc N listens on the loopback interface only; torchrun listens on all network "
            "interfaces without authentication and unpickles what it receives: use it only on a trusted network",
        }
    )
    checkup.run()
    return Diagnosis(checkup.facts, checkup.problems, checkup.notes)


parser = OneLineParser(
    prog="vgglab doctor",
    description="Check this machine, its devices and the installation of vgglab.",
    epilog="Exit codes: 0 no problems; 1 problems found, each with a fix; 2 unknown flag.",
)
parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def main(argv: Sequence[str]) -> int:
    as_json = parser.parse_args(argv).json
    diagnosis = check_machine()
    fields = {**vars(diagnosis), "auto": diagnosis.facts["--device auto"]}
    print(json.dumps(fields) if as_json else diagnosis)
    return 1 if diagnosis.problems else 0


if __name__ == "__main__":
    raise SystemExit(call("doctor"))
