"""The subcommands, such as ``vgglab plan`` and ``vgglab compare``. Each module parses options and prints a result.

Each has a ``parser`` and ``main(argv)``; ``main`` returns the exit code, or raises UserError for bad input.
``vgglab/__main__.py`` calls them. The older form ``python -m vgglab.plan`` still works.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any, Callable, Sequence

EXIT_BROKEN_PIPE = 141  # shell convention: 128 + SIGPIPE


def call(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see ``guard``)."""
    return guard(
        name,
        lambda: importlib.import_module(f"vgglab.commands.{name}").main(sys.argv[1:] if argv is None else argv),
    )


def guard(name: str, run: Callable[[], int | None]) -> int:
    """Return what ``run()`` returns, or 0 for None, 2 for bad input, 130 after Ctrl-C, 141 for a closed pipe."""
    from vgglab.dist.ranks import open_closed_streams
    from vgglab.errors import UserError

    open_closed_streams()
    try:
        with contextlib.redirect_stdout(_Output(sys.stdout)):
            code = run() or 0
            sys.stdout.flush()
    except UserError as error:
        print_error(name, error)
        return 2
    except OutputError as error:
        [cause] = error.args
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at exit
        if isinstance(cause, BrokenPipeError):  # the other end of the pipe was closed
            return EXIT_BROKEN_PIPE
        print_error(name, UserError(f"the output cannot be written ({cause.strerror})"))
        return 2
    except KeyboardInterrupt:
        print(f"vgglab.{name}: interrupted", file=sys.stderr)
        return 130
    return code


class OutputError(Exception):
    """Wraps the OSError of a failed write to stdout. Any other OSError is a bug and keeps its traceback."""


class _Output:
    """Wraps a stream, and raises OutputError instead of OSError."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._call(self._stream.write, text)

    def flush(self) -> None:
        self._call(self._stream.flush)

    def _call(self, method: Callable[..., Any], *arguments: str) -> Any:
        try:
            return method(*arguments)
        except OSError as error:
            raise OutputError(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_error(name: str, error: Exception) -> None:
    """Print an error to stderr, as one line."""
    with contextlib.suppress(OSError):
        print(f"vgglab.{name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
