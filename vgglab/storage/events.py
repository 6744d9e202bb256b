"""Read the valid events from ``events.jsonl`` while it grows, and report damage. Standard library only."""

from __future__ import annotations

import os
import re
import threading
import zlib
from pathlib import Path
from typing import BinaryIO, Iterator, Sequence, Tuple, cast, overload

from vgglab.errors import UserError
from vgglab.storage.files import MAX_BYTES, refusing_links
from vgglab.storage.schema import CHECK, Content, event_in, is_intact

Event = Content  # the fields of a line
MAX_EVENTS_BYTES = 2**30  # bytes
CHUNK = 2**20  # bytes
MAX_PARSED = 20_000  # lines; after that, only the byte offset of a training line is kept, and it is parsed on access
TRAINING_LINE = re.compile(rb'\{"event": "train", "seconds": [^,]*, "epoch": \d+, "step": (\d{1,15}), ')
NUMBER = re.compile(rb'"line": (\d{1,15}), "check": "\w{8}"\}\n$')
MAX_STARTS = 1000  # of a continued run; each start goes through all events before it


class LongEvents(Sequence[Event]):
    """The events of a long file; training events are read on access."""

    def __init__(self, file: Path, identity: Identity, entries: list[Event | int]) -> None:
        """``entries``: events, or their byte offsets in the file if they are still to be read."""
        self._file, self._identity, self._entries = file, identity, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Event]:
        with _opened(self._file) as lines:
            if _identity_of(lines) != self._identity:
                raise UserError(f"{self._file}: was replaced while it was being read")
            for entry in self._entries:
                yield _event_at(lines, entry) if isinstance(entry, int) else entry

    @overload
    def __getitem__(self, index: int) -> Event: ...

    @overload
    def __getitem__(self, index: slice) -> LongEvents: ...

    def __getitem__(self, index: int | slice) -> Event | LongEvents:
        chosen = self._entries[index]
        if isinstance(chosen, list):
            return LongEvents(self._file, self._identity, chosen)
        return next(iter(LongEvents(self._file, self._identity, [chosen])))

    def turning_points(self) -> LongEvents:
        """The events, without unread training events that are followed by another unread one."""
        following = [*self._entries[1:], None]
        pairs = zip(self._entries, following)
        kept = [e for e, after in pairs if not (isinstance(e, int) and isinstance(after, int))]
        return LongEvents(self._file, self._identity, kept)


Identity = Tuple[int, int]


def _identity_of(file: BinaryIO) -> Identity:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _opened(file: Path) -> BinaryIO:
    """Open a file for reading. Raises UserError if it cannot be read or is a link."""
    try:
        return open(file, "rb", opener=refusing_links)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _event_at(lines: BinaryIO, offset: int) -> Event:
    lines.seek(offset)
    event = event_in(lines.readline(MAX_BYTES))
    if event is None or event["event"] != "train":
        raise UserError(f"{lines.name}: was changed while it was being read, or contains an invalid training event")
    event.pop("line", None)
    return event


class EventFile:
    """The events written so far; each access reads only the lines added since the previous access."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._reading = threading.Lock()  # a dashboard's thread and a cell may read at the same time
        self._start_again()

    def _start_again(self) -> None:
        self._seen: list[Event | int] = []
        self._num_bytes_seen = self._num_damaged = self._num_missing = 0
        self._next_line = 0
        self._num_starts = self._last_step = 0
        self._identity: Identity = (0, 0)
        self._has_checksums = False  # once a line has a checksum, all later lines must have one

    def read(self, kind: str | None = None) -> Sequence[Event]:
        """All valid events, or those of one kind; a list unless the file is long.

        If the run was resumed from a checkpoint, events that were written between it and the resume are left out.

        Raises:
            UserError: the file exists but cannot be read.
        """
        if self.file.is_symlink():
            raise UserError(f"{self.file}: is a symbolic link and was not read")
        if self.file.is_file():
            with self._reading, _opened(self.file) as lines:
                size = os.fstat(lines.fileno()).st_size
                if size > MAX_EVENTS_BYTES:
                    raise UserError(
                        f"{self.file}: has more than {MAX_EVENTS_BYTES >> 30} GiB, so vgglab did not write it"
                    )
                identity = _identity_of(lines)
                if size < self._num_bytes_seen or identity != self._identity:  # the first access, or a different file
                    self._start_again()
                    self._identity = identity
                lines.seek(self._num_bytes_seen)
                for line in iter(lambda: lines.readline(MAX_BYTES), b""):
                    if not line.endswith(b"\n") and len(line) < MAX_BYTES:  # still being written
                        break
                    self._take(line)
                    self._num_bytes_seen += len(line)
        elif any(isinstance(e, int) for e in self._seen):  # the file was deleted, and its unread lines with it
            self._start_again()
        chosen = [e for e in self._seen if kind in (None, "train" if isinstance(e, int) else e["event"])]
        if any(isinstance(e, int) for e in chosen):
            return LongEvents(self.file, self._identity, chosen)
        return cast("list[Event]", chosen)

    def _take(self, line: bytes) -> None:
        if line.isspace():  # written by a run that continues, to end an incomplete line
            return
        if len(self._seen) >= MAX_PARSED and self._is_the_next_training_line(line):
            self._seen.append(self._num_bytes_seen)
            self._next_line += 1
            return
        event = event_in(line, self._has_checksums)
        number = event.pop("line", None) if event else None  # also None in runs of earlier versions
        if event is None or (number is not None and number < self._next_line):  # damaged, or a duplicate
            self._num_damaged += 1
            return
        if number is not None:
            self._num_missing += number - self._next_line
            self._next_line = number + 1
        self._has_checksums = self._has_checksums or f'"{CHECK}": '.encode() in line
        if event["event"] == "start":
            self._num_starts += 1
            if self._num_starts > MAX_STARTS:
                raise UserError(f"{self.file}: has more than {MAX_STARTS} start events, so vgglab did not write it")
            self._leave_out_after(event)
            self._last_step = event["first_step"]
        self._last_step = max(self._last_step, event.get("step", 0))
        self._seen.append(event)

    def _is_the_next_training_line(self, line: bytes) -> bool:
        """Whether this is an intact training line with the next number, which need not be parsed yet."""
        found = TRAINING_LINE.match(line)
        is_plain = found is not None and b"\\" not in line and line.count(b'"event": ') == 1 and is_intact(line)
        number = NUMBER.search(line) if is_plain else None
        if found is None or number is None or int(number[1]) != self._next_line or int(found[1]) <= self._last_step:
            return False
        self._last_step = int(found[1])
        return True

    def _leave_out_after(self, start: Event) -> None:
        """Remove the events of steps that are repeated after the run restarted at ``start``."""
        redone = set()
        with _opened(self.file) as lines:
            for entry in reversed(self._seen):
                if isinstance(entry, int):
                    if _is_before(_event_at(lines, entry), start):
                        break  # training lines are in the order of their steps
                    redone.add(entry)
        self._seen = [e for e in self._seen if (e not in redone if isinstance(e, int) else _is_before(e, start))]

    def checksum(self) -> str:
        """Size in bytes and checksum of the whole file; empty if it cannot be read."""
        value, size = 0, self._size()
        if not 0 < size <= MAX_EVENTS_BYTES:
            return ""
        try:
            with _opened(self.file) as content:
                for part in iter(lambda: content.read(CHUNK), b""):
                    value = zlib.crc32(part, value)
        except (OSError, UserError):
            return ""
        return f"{size}-{value:08x}"

    def has_checksum(self, expected: str) -> bool:
        """Whether ``checksum()`` equals ``expected``; the file is not read if its size differs."""
        return expected.startswith(f"{self._size()}-") and expected == self.checksum()

    def _size(self) -> int:
        try:
            return os.stat(self.file, follow_symlinks=False).st_size if self.file.is_file() else 0
        except OSError:
            return 0

    @property
    def has_checksums(self) -> bool:
        """Whether the lines have checksums, as in all runs of this version."""
        return self._has_checksums

    def next_number(self) -> int:
        """The number of the next line to be written."""
        self.read()
        return self._next_line

    def damage(self, is_over: bool) -> list[str]:
        """Phrases about missing and damaged lines. If the run ``is_over``, an incomplete last line is damaged."""
        self.read()
        num_damaged, found = self._num_damaged, []
        if is_over and self.file.is_file() and self.file.stat().st_size > self._num_bytes_seen:
            num_damaged += 1  # the last line is incomplete
        num_missing = self._num_missing - self._num_damaged  # damaged lines count as missing too
        if num_missing > 0:
            found.append(f"events.jsonl: {num_missing} line{'s' * (num_missing > 1)} missing")
        if num_damaged:
            found.append(f"events.jsonl: {num_damaged} damaged line{'s' * (num_damaged > 1)}, left out")
        return found


def _is_before(event: Event, start: Event) -> bool:
    """Whether this event comes before the point at which a run is (re)started."""
    if event["event"] in ("end", "start"):
        return False
    if event["event"] in ("eval_start", "eval", "checkpoint"):
        return event["epoch"] is not None and event["epoch"] < start["first_epoch"]
    return event.get("step", 0) <= start["first_step"]
