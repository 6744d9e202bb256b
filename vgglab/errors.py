"""The exceptions that are meant for the person at the keyboard."""

from __future__ import annotations

import contextlib
from typing import Iterator


class UserError(Exception):
    """Something the reader can put right.

    The message is one line that names the flag or the file and says what to do. The shell door
    prints it on stderr and leaves with exit code 2; everything else is a bug and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a cell: the line, without the way it took through our code."""
        return [f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def blaming(culprit: str) -> Iterator[None]:
    """Put the flag or the file in front of what is refused in the block: ``--resume x.pt: holds no weights``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{culprit}: {error}") from None


class RunFailed(RuntimeError):
    """A launched run ended in an error; the message ends with what it printed last, its traceback included."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
