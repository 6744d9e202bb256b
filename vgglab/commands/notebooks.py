"""``vgglab notebooks DIR``: copy the notebooks into a working folder."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

import vgglab
from vgglab.commands import call
from vgglab.errors import UserError
from vgglab.settings.flags import OneLineParser

PACKAGE = Path(vgglab.__file__).resolve().parent


def find_notebooks() -> list[Path]:
    """Return the notebooks of this installation: in the package (wheel) or next to it (checkout)."""
    for folder in (PACKAGE / "notebooks", PACKAGE.parent / "notebooks"):
        notebooks = sorted(folder.glob("[0-9]*.ipynb"))
        if notebooks:
            return notebooks
    raise UserError(f"no notebooks in {PACKAGE}; reinstall vgglab")


def copy_notebooks(folder: Path) -> list[Path]:
    """Copy the notebooks and return the copies. Nothing is written if a copy exists: it may contain your work.

    Raises:
        UserError: a file with the name of a notebook exists in the folder, or the folder cannot be written.
    """
    copies = {folder / original.name: original for original in find_notebooks()}
    for copy in copies:
        if copy.exists():
            raise UserError(f"{copy}: already exists; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for copy, original in copies.items():
            with copy.open("xb") as file:
                file.write(original.read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None
    return list(copies)


parser = OneLineParser(
    prog="vgglab notebooks", description="Copy the notebooks into a folder; existing files are never overwritten."
)
parser.add_argument("folder", type=Path, help="target folder; created if it does not exist")


def main(argv: Sequence[str]) -> int:
    options = parser.parse_args(argv)
    copies = copy_notebooks(options.folder)
    print(f"copied {len(copies)} notebooks to {options.folder}; next: vgglab lab {options.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(call("notebooks"))
