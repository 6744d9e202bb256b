"""The commands ``vgglab plan``, ``vgglab compare`` and so on: one module each, with its options and what it prints.

A module has ``parser()`` and ``main(argv)``, which returns the exit code and raises UserError. ``vgglab/__main__.py``
calls them; so does ``python -m vgglab.plan``, as it was before there was one command.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Sequence

EXIT_BROKEN_PIPE = 141  # as a shell has it: 128 + SIGPIPE


def call(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: that of ``main``, 2 for bad input, 130 after Ctrl-C."""
    from vgglab.dist.ranks import open_closed_streams
    from vgglab.errors import UserError

    open_closed_streams()
    try:
        code = importlib.import_module(f"vgglab.commands.{name}").main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        say_error(name, error)
        return 2
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is not None:  # not of the output
            raise
        say_error(name, UserError(f"the output cannot be written ({error.strerror})"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try to write the rest at its end
        return 2
    except KeyboardInterrupt:
        print(f"vgglab.{name}: interrupted", file=sys.stderr)
        return 130
    return code


def say_error(name: str, error: Exception) -> None:
    """One line on stderr."""
    with contextlib.suppress(OSError):
        print(f"vgglab.{name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
