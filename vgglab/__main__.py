"""The command ``vgglab``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import NoReturn

from vgglab.commands import call, guard
from vgglab.version import __version__

COMMANDS = {
    "Learn": {
        "notebooks": "copy the notebooks into a folder",
        "lab": "open the notebooks in JupyterLab",
        "anatomy": "show a network layer by layer: shapes, parameters, operations, time",
    },
    "Train": {
        "plan": "estimate a long run: hours, steps, disk space, learning rates",
        "train": "train, resume, evaluate",
        "data": "find images that cannot be read",
        "bench": "measure the speed of data loading and of training steps",
        "doctor": "check this machine: devices, versions, problems",
    },
    "Look at runs": {
        "results": "compare many runs in tables or on a web page",
        "compare": "find the first difference between two runs",
        "report": "recompute the report.json of a run",
        "book": "run all notebooks and build a web site from them",
    },
}
NAMES = [name for group in COMMANDS.values() for name in group]


def usage() -> str:
    lines = ["usage: vgglab COMMAND [option ...]", ""]
    for group, commands in COMMANDS.items():
        lines += [f"{group}:", *(f"  {name:11s}{about}" for name, about in commands.items()), ""]
    return "\n".join([*lines, "vgglab COMMAND --help shows the options. To enable tab completion in bash:",
                      '  eval "$(register-python-argcomplete vgglab)"'])  # fmt: skip


def main() -> NoReturn:
    """Entry point of ``vgglab`` and ``python -m vgglab``: run the given command, then exit."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    name, argv = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help", "help"):
        sys.exit(guard("help", lambda: print(usage())))
    if name == "--version":
        sys.exit(guard("version", lambda: print(f"vgglab {__version__}")))
    if name not in NAMES:
        matches = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"choose from {', '.join(NAMES)}"
        print(f"vgglab: error: {name!r} is not a command; {hint}", file=sys.stderr)
        sys.exit(2)
    if name == "train":
        from vgglab.train import run_and_exit

        run_and_exit(argv)
    sys.exit(call(name, argv))


def _complete() -> None:
    """Answer a request for shell completion, loading only the flags of the command being typed."""
    import argparse

    try:
        import argcomplete
    except ImportError:
        return
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    typed = os.environ.get("COMP_LINE", "").split()
    for name in NAMES:
        if name not in typed[1:2]:
            commands.add_parser(name)
        elif name == "train":
            from vgglab.settings.parser import build_parser

            commands.add_parser(name, parents=[build_parser(show_all=True)], add_help=False)
        else:
            module = importlib.import_module(f"vgglab.commands.{name}")
            commands.add_parser(name, parents=[module.parser], add_help=False)
    argcomplete.autocomplete(parser)


if __name__ == "__main__":
    main()
