"""Exceptions with messages written for the user."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

# What could command a terminal, turn the direction of reading, forge a line, or cannot be encoded at all.
NOT_PRINTED = [*range(9), *range(11, 32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F)]
NOT_PRINTED += [*range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_PRINTED = dict.fromkeys(NOT_PRINTED, "\N{REPLACEMENT CHARACTER}")


def printable(value: Any) -> Any:
    """Remove characters that control a terminal or reverse the reading direction; newlines and tabs stay."""
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() else value.translate(_PRINTED)
    if isinstance(value, dict):
        return {printable(name): printable(item) for name, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


# What to do about a loss or a weight that is not a finite number.
NOT_FINITE = "the last checkpoint was saved before that; lower --lr or lengthen --warmup"


class UserError(Exception):
    """An error that the user can fix.

    The message is one line that names the flag or the file and what to do about it. The commands
    print it on stderr and exit with code 2; everything else is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        return " ".join(printable(super().__str__()).splitlines())

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a cell: the message without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class BadImage(UserError):
    """A listed image that cannot be used; the message names the file."""

    def __init__(self, message: str, file: str = "", reason: str = "") -> None:
        super().__init__(message)  # one argument is enough: workers send exceptions by their message
        self.file, self.reason = file, reason


@contextlib.contextmanager
def error_context(culprit: str) -> Iterator[None]:
    """Prefix each UserError raised in the block with the flag or file: ``--resume x.pt: holds no weights``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{culprit}: {error}") from None


class RunFailed(RuntimeError):
    """A launched run failed; the message ends with its last output, including the traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
