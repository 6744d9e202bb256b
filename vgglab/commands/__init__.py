"""The commands ``vgglab plan``, ``vgglab compare`` and so on: one module each, with its options and what it prints.

A module has ``parser()`` and ``main(argv)``, which returns the exit code and raises UserError. ``vgglab/__main__.py``
calls them. The older spelling ``python -m vgglab.plan`` does, too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any, Iterator, Sequence

EXIT_BROKEN_PIPE = 141  # as a shell has it: 128 + SIGPIPE


def call(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: the one from ``main``, 2 for bad input, 130 after Ctrl-C."""
    from vgglab.dist.ranks import open_closed_streams
    from vgglab.errors import UserError

    open_closed_streams()
    try:
        with contextlib.redirect_stdout(_Output(sys.stdout)):
            code = importlib.import_module(f"vgglab.commands.{name}").main(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
    except UserError as error:
        say_error(name, error)
        return 2
    except CannotPrint as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try to write the rest at its end
        if isinstance(error.cause, BrokenPipeError):  # the reader of the output has closed it
            return EXIT_BROKEN_PIPE
        say_error(name, UserError(f"the output cannot be written ({error.cause.strerror})"))
        return 2
    except KeyboardInterrupt:
        print(f"vgglab.{name}: interrupted", file=sys.stderr)
        return 130
    return code


class CannotPrint(Exception):
    """stdout cannot be written to; any other OSError is a bug and keeps its traceback."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Output:
    """A stream that raises CannotPrint for an OSError."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _cannot_print():
            return self._stream.write(text)

    def flush(self) -> None:
        with _cannot_print():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _cannot_print() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotPrint(error) from None


def say_error(name: str, error: Exception) -> None:
    """Print an error on stderr, in one line."""
    with contextlib.suppress(OSError):
        print(f"vgglab.{name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
