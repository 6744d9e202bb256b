"""``events.jsonl``, read while it grows: what still stands of it, and what of it is damaged. Standard library only."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from vgglab.errors import UserError
from vgglab.storage.files import MAX_BYTES
from vgglab.storage.schema import CHECK, Content, event_in

Event = Content  # what a line holds
MAX_EVENTS_BYTES = 2**30  # bytes


class EventFile:
    """The lines so far; each look takes in those that were added since the last."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._reading = threading.Lock()  # a dashboard's thread and a cell may look at the same moment
        self._start_again()

    def _start_again(self) -> None:
        self._seen: list[Event] = []
        self._num_bytes_seen = self._num_damaged = self._num_missing = 0
        self._next_line = 0
        self._has_checksums = False  # from the first line with one on, all must have one

    def read(self) -> list[Event]:
        """All events that still stand: where a run went on from a checkpoint, without what came after that before.

        Raises:
            UserError: there is a file, and it cannot be read.
        """
        if self.file.is_symlink():
            raise UserError(f"{self.file}: is a link, which is not followed")
        if self.file.is_file():
            try:
                opened = self.file.open("rb")
            except OSError as error:
                raise UserError(f"{self.file}: cannot be read ({error.strerror})") from None
            with self._reading, opened as lines:
                size = os.fstat(lines.fileno()).st_size
                if size > MAX_EVENTS_BYTES:
                    raise UserError(f"{self.file}: has more than {MAX_EVENTS_BYTES >> 30} GiB, which no run writes")
                if size < self._num_bytes_seen:  # another run, in a folder made anew
                    self._start_again()
                lines.seek(self._num_bytes_seen)
                for line in iter(lambda: lines.readline(MAX_BYTES), b""):
                    if not line.endswith(b"\n") and len(line) < MAX_BYTES:  # it is being written
                        break
                    self._num_bytes_seen += len(line)
                    self._take(line)
        return self._seen

    def _take(self, line: bytes) -> None:
        if line.isspace():  # written by a run that goes on, to end a line that was cut short
            return
        event = event_in(line, self._has_checksums)
        number = event.pop("line", None) if event else None  # None, too, in runs of earlier versions
        if event is None or (number is not None and number < self._next_line):  # damaged, or once more
            self._num_damaged += 1
            return
        if number is not None:
            self._num_missing += number - self._next_line
            self._next_line = number + 1
        self._has_checksums = self._has_checksums or f'"{CHECK}": '.encode() in line
        if event["event"] == "start":
            self._seen = [earlier for earlier in self._seen if _is_before(earlier, event)]
        self._seen.append(event)

    @property
    def has_checksums(self) -> bool:
        """Whether the lines carry them, as all of this version do."""
        return self._has_checksums

    def next_number(self) -> int:
        """Of the line to be written next."""
        self.read()
        return self._next_line

    def damage(self, is_over: bool) -> list[str]:
        """How many lines were left out, in words; of a run that ``is_over`` nobody is still writing the last one."""
        self.read()
        num_damaged, found = self._num_damaged, []
        if is_over and self.file.is_file() and self.file.stat().st_size > self._num_bytes_seen:
            num_damaged += 1  # the last, cut short
        num_missing = self._num_missing - self._num_damaged  # a damaged line is missing, too
        if num_missing > 0:
            found.append(f"events.jsonl: {num_missing} line{'s' * (num_missing > 1)} missing")
        if num_damaged:
            found.append(f"events.jsonl: {num_damaged} damaged line{'s' * (num_damaged > 1)}, left out")
        return found


def _is_before(event: Event, start: Event) -> bool:
    """Whether a run that starts (again) at ``start`` has this event behind it."""
    if event["event"] in ("end", "start"):
        return False
    if event["event"] in ("eval_start", "eval", "checkpoint"):
        return event["epoch"] is not None and event["epoch"] < start["first_epoch"]
    return event.get("step", 0) <= start["first_step"]
