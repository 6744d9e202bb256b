"""``vgglab lab [DIR]``: open the notebooks in JupyterLab."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Sequence

from vgglab.commands import call
from vgglab.commands.notebooks import copy_notebooks
from vgglab.errors import UserError
from vgglab.settings.flags import OneLineParser

parser = OneLineParser(
    prog="vgglab lab",
    description="Open the notebooks in JupyterLab. Other flags, such as --no-browser, are passed to JupyterLab.",
)
parser.add_argument(
    "folder",
    nargs="?",
    type=Path,
    default=Path("vgglab-notebooks"),
    help="notebook folder; if it does not exist, it is created with copies of the notebooks (default %(default)s)",
)


def main(argv: Sequence[str]) -> int:
    options, jupyter_argv = parser.parse_known_args(argv)
    if find_spec("jupyterlab") is None:
        raise UserError("JupyterLab is not installed; run pip install 'vgglab[lab]'")
    if not options.folder.exists():
        copy_notebooks(options.folder)
    first = min(options.folder.glob("*.ipynb"), default=options.folder)
    root = ["--allow-root"] if os.getuid() == 0 else []
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(first), *root, *jupyter_argv])


if __name__ == "__main__":
    raise SystemExit(call("lab"))
