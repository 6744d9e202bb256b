"""Exceptions with messages written for the user."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

# Characters that control a terminal, reverse the reading direction, fake a line break, or cannot be encoded.
UNPRINTABLE = [*range(9), *range(11, 32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F)]
UNPRINTABLE += [*range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_REPLACEMENTS = dict.fromkeys(UNPRINTABLE, "\N{REPLACEMENT CHARACTER}")


def printable(value: Any) -> Any:
    """Replace characters that control a terminal or reverse the reading direction; newlines and tabs are kept."""
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() else value.translate(_REPLACEMENTS)
    if isinstance(value, dict):
        return {printable(name): printable(item) for name, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


# Advice in errors about a loss or weight that is not finite.
NOT_FINITE_ADVICE = "no checkpoint was saved at this step; lower --lr or lengthen --warmup"


class UserError(Exception):
    """An error that the user can fix.

    The message is one line that names the flag or file and says how to fix the problem. Commands print
    it to stderr and exit with code 2; any other exception is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        return " ".join(printable(super().__str__()).splitlines())

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in a cell: the message without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class BadImage(UserError):
    """An image of the data set that cannot be read; the message names the file."""

    def __init__(self, message: str, file: str = "", reason: str = "") -> None:
        super().__init__(message)  # the rest is optional: an error in a worker is re-raised from its message alone
        self.file, self.reason = file, reason


@contextlib.contextmanager
def error_context(subject: str) -> Iterator[None]:
    """Prefix each UserError raised in the block with the flag or file: ``--resume x.pt: is damaged``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from None


class RunFailed(RuntimeError):
    """A launched run failed; the message ends with the traceback or the last lines of its output."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
