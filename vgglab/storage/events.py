"""Read the valid events from ``events.jsonl`` while it grows, and report damage. Standard library only."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import zlib
from pathlib import Path
from typing import BinaryIO, Iterator, Sequence, cast, overload

from vgglab.errors import UserError
from vgglab.storage.files import MAX_BYTES, nofollow_opener
from vgglab.storage.schema import CHECK, Content, is_event, is_intact, parse_line

Event = Content  # the fields of a line
MAX_EVENTS_BYTES = 2**30  # bytes
CHUNK_BYTES = 2**20  # bytes
MAX_PARSED = 20_000  # lines; after that, only the byte offset of a training line is kept, and it is parsed on access
TRAIN_LINE = re.compile(rb'\{"event": "train", "seconds": [^,]*, "epoch": \d+, "step": (\d{1,15}), ')
LINE_NUMBER = re.compile(rb'"line": (\d{1,15}), "check": "\w{8}"\}\n$')
MAX_STARTS = 1000  # of a continued run; each start goes through all events before it


class LongEvents(Sequence[Event]):
    """The events of a long file; training events are read on access."""

    def __init__(self, file: Path, identity: tuple[int, int], entries: list[Event | int]) -> None:
        """``entries``: events, or their byte offsets in the file if they are still to be read."""
        self._file, self._identity, self._entries = file, identity, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Event]:
        with _open(self._file) as lines:
            if _identity_of(lines) != self._identity:
                raise UserError(f"{self._file}: was replaced while it was being read")
            for entry in self._entries:
                yield _read_event_at(lines, entry) if isinstance(entry, int) else entry

    @overload
    def __getitem__(self, index: int) -> Event: ...

    @overload
    def __getitem__(self, index: slice) -> LongEvents: ...

    def __getitem__(self, index: int | slice) -> Event | LongEvents:
        if isinstance(index, slice):
            return LongEvents(self._file, self._identity, self._entries[index])
        return next(iter(LongEvents(self._file, self._identity, [self._entries[index]])))

    def latest_of_each_kind(self) -> LongEvents:
        """Return the latest event of each kind, in order; the others are not read."""
        latest: dict[str, Event | int] = {}
        for entry in reversed(self._entries):
            latest.setdefault("train" if isinstance(entry, int) else entry["event"], entry)
        return LongEvents(self._file, self._identity, [*reversed(latest.values())])


def _identity_of(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _open(file: Path) -> BinaryIO:
    """Open a file for reading. Raises UserError if it cannot be read or is a link."""
    try:
        return open(file, "rb", opener=nofollow_opener)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _read_event_at(lines: BinaryIO, offset: int) -> Event:
    lines.seek(offset)
    event = parse_line(lines.readline(MAX_BYTES), is_event)
    if event is None or event["event"] != "train":
        raise UserError(f"{lines.name}: was changed while it was being read, or contains an invalid training event")
    event.pop("line", None)
    return event


class EventFile:
    """The events written so far; each access reads only the lines added since the previous access."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()  # a dashboard's thread and a cell may read at the same time
        self._reset()

    def _reset(self, identity: tuple[int, int] = (0, 0)) -> None:
        self._entries: list[Event | int] = []
        self._num_bytes_read = self._num_damaged = self._num_missing = 0
        self._next_line = 0
        self._num_starts = self._last_step = 0
        self._identity = identity
        self.has_checksums = False  # once a line has a checksum, all later lines must have one

    def read(self, kind: str | None = None) -> Sequence[Event]:
        """All valid events, or those of one kind; a list unless the file is long.

        If the run was resumed from a checkpoint, the events between that checkpoint and the resume are left out.

        Raises:
            UserError: the file exists but cannot be read.
        """
        if self.file.is_symlink():
            raise UserError(f"{self.file}: is a symbolic link and was not read")
        if self.file.is_file():
            with self._lock, _open(self.file) as lines:
                size = os.fstat(lines.fileno()).st_size
                if size > MAX_EVENTS_BYTES:
                    raise UserError(
                        f"{self.file}: is larger than {MAX_EVENTS_BYTES >> 30} GiB, so vgglab cannot have written it"
                    )
                identity = _identity_of(lines)
                if size < self._num_bytes_read or identity != self._identity:  # the first access, or a different file
                    self._reset(identity)
                lines.seek(self._num_bytes_read)
                for line in iter(lambda: lines.readline(MAX_BYTES), b""):
                    if not line.endswith(b"\n") and len(line) < MAX_BYTES:  # still being written
                        break
                    self._add_line(line)
                    self._num_bytes_read += len(line)
        elif any(isinstance(e, int) for e in self._entries):  # the file was deleted, and its unread lines with it
            self._reset()
        chosen = [e for e in self._entries if kind in (None, "train" if isinstance(e, int) else e["event"])]
        if any(isinstance(e, int) for e in chosen):
            return LongEvents(self.file, self._identity, chosen)
        return cast("list[Event]", chosen)

    def _add_line(self, line: bytes) -> None:
        if line.isspace():  # written by a run that continues, to end an incomplete line
            return
        if len(self._entries) >= MAX_PARSED and self._is_next_training_line(line):
            self._entries.append(self._num_bytes_read)
            self._next_line += 1
            return
        event = parse_line(line, is_event, self.has_checksums)
        number = event.pop("line", None) if event else None  # also None in runs of earlier versions
        if event is None or (number is not None and number < self._next_line):  # damaged, or a duplicate
            self._num_damaged += 1
            return
        if number is not None:
            self._num_missing += number - self._next_line
            self._next_line = number + 1
        self.has_checksums = self.has_checksums or f'"{CHECK}": '.encode() in line
        if event["event"] == "start":
            self._num_starts += 1
            if self._num_starts > MAX_STARTS:
                raise UserError(
                    f"{self.file}: has more than {MAX_STARTS} start events, so vgglab cannot have written it"
                )
            self._drop_repeated_events(event)
            self._last_step = event["first_step"]
        self._last_step = max(self._last_step, event.get("step", 0))
        self._entries.append(event)

    def _is_next_training_line(self, line: bytes) -> bool:
        """Whether this is an intact training line with the next line number; such a line need not be parsed yet."""
        match = TRAIN_LINE.match(line)
        is_plain = match is not None and b"\\" not in line and line.count(b'"event": ') == 1 and is_intact(line)
        number = LINE_NUMBER.search(line) if is_plain else None
        if match is None or number is None or int(number[1]) != self._next_line or int(match[1]) <= self._last_step:
            return False
        self._last_step = int(match[1])
        return True

    def _drop_repeated_events(self, start: Event) -> None:
        """Remove the events of steps that are repeated after the run restarted at ``start``."""
        redone = set()
        with _open(self.file) as lines:
            for entry in reversed(self._entries):
                if isinstance(entry, int):
                    if _is_before(_read_event_at(lines, entry), start):
                        break  # training lines are in the order of their steps
                    redone.add(entry)
        self._entries = [e for e in self._entries if (e not in redone if isinstance(e, int) else _is_before(e, start))]

    def checksum(self) -> str:
        """Size in bytes and checksum of the whole file; empty if it cannot be read."""
        value = 0
        try:
            with _open(self.file) as content:
                size = os.fstat(content.fileno()).st_size
                if not 0 < size <= MAX_EVENTS_BYTES:
                    return ""
                for part in iter(lambda: content.read(CHUNK_BYTES), b""):
                    value = zlib.crc32(part, value)
        except (OSError, UserError):
            return ""
        return f"{size}-{value:08x}"

    def has_checksum(self, expected: str) -> bool:
        """Whether ``checksum()`` equals ``expected``; the file is not read if its size differs."""
        with contextlib.suppress(OSError):
            return expected.startswith(f"{self.file.lstat().st_size}-") and expected == self.checksum()
        return False

    def next_line_number(self) -> int:
        """The number of the next line to be written."""
        self.read()
        return self._next_line

    def damage(self, has_ended: bool) -> list[str]:
        """Phrases about missing and damaged lines. If ``has_ended``, an incomplete last line counts as damaged."""
        self.read()
        num_damaged, phrases = self._num_damaged, []
        if has_ended and self.file.is_file() and self.file.stat().st_size > self._num_bytes_read:
            num_damaged += 1  # the last line is incomplete
        num_missing = self._num_missing - self._num_damaged  # damaged lines count as missing too
        if num_missing > 0:
            phrases.append(f"events.jsonl: {num_missing} line{'s' * (num_missing > 1)} missing")
        if num_damaged:
            phrases.append(f"events.jsonl: {num_damaged} damaged line{'s' * (num_damaged > 1)}, left out")
        return phrases


def _is_before(event: Event, start: Event) -> bool:
    """Whether this event comes before the point at which a run is (re)started."""
    if event["event"] in ("end", "start"):
        return False
    if event["event"] != "train" and "epoch" in event:
        return event["epoch"] is not None and event["epoch"] < start["first_epoch"]
    return event.get("step", 0) <= start["first_step"]
