"""The format of the files in a run directory: fields, types, ranges and checksums.

A run directory may come from an untrusted source, so everything in it is read through this module. Each line and each
document has a checksum (``check``: CRC-32 of the other fields as JSON), so that a flipped bit is detected. Files of
earlier versions have no checksums. Standard library only.
"""

from __future__ import annotations

import errno
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, Callable

from vgglab.errors import UserError, printable
from vgglab.storage.files import exists, read_bytes, refusing_links

Content = dict  # of a line or a document
Test = Callable[[Any], bool]
CHECK = "check"
# Beyond these, arithmetic and the axes of figures overflow.
MAX_SECONDS = 1e12  # seconds, or images per second
MIN_DIVISOR = 1e-12  # the smallest number accepted as a divisor
MAX_INT = 10**15
MAX_FLOAT = 1e40  # float32 ends at 3.4e38
MAX_NESTING = 8  # levels of nested objects and lists


def text(value: Any) -> bool:
    return isinstance(value, str)


def switch(value: Any) -> bool:
    return isinstance(value, bool)


def number(value: Any) -> bool:
    return whole(value) or (type(value) is float and abs(value) < MAX_FLOAT)


def seconds(value: Any) -> bool:
    return number(value) and 0 <= value < MAX_SECONDS


def positive(value: Any) -> bool:
    return number(value) and MIN_DIVISOR < value < MAX_SECONDS


def whole(value: Any) -> bool:
    return type(value) is int and abs(value) < MAX_INT


def count(value: Any) -> bool:
    return whole(value) and value >= 0


def count_from_1(value: Any) -> bool:
    return whole(value) and value >= 1


def nothing(value: Any) -> bool:
    return value is None


def maybe(test: Test) -> Test:
    return either(nothing, test)


def either(*tests: Test) -> Test:
    return lambda value: any(test(value) for test in tests)


def one_of(*words: str) -> Test:
    return lambda value: value in words


def list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def record(needed: dict[str, Test], **optional: Test) -> Test:
    """A test for a JSON object with these fields."""
    tests = {**optional, **needed}
    return lambda value: (
        isinstance(value, dict)
        and value.keys() >= needed.keys()
        and all(tests[name](item) for name, item in value.items() if name in tests)
    )


def table_of(test: Test, *names: str) -> Test:
    """A test for a JSON object whose values all pass ``test``, and which has the keys ``names``."""
    return lambda value: isinstance(value, dict) and value.keys() >= set(names) and all(map(test, value.values()))


# The required fields of each event, and optional fields of any event.
EVENTS: dict[str, dict[str, Test]] = {
    "start": {
        "data": text, "is_fake": switch, "num_train_images": count, "num_eval_images": count,
        "num_classes": count_from_1, "num_parameters": count, "epochs": count, "first_epoch": count,
        "first_step": count, "num_steps": count, "steps_per_epoch": count,
        "best": maybe(table_of(number, "acc1", "acc5")),
    },
    "train": {
        "epoch": count, "step": count, "loss": maybe(number), "acc1": maybe(number), "lr": number,
        "is_measured": switch, "interval_images": count, "interval_steps": count_from_1, "interval_seconds": positive,
    },
    "eval_start": {"epoch": maybe(whole), "num_batches": count},
    "eval": {
        "epoch": maybe(whole), "step": count, "loss": maybe(number), "acc1": number, "acc5": number,
        "num_images": count,
    },
    "checkpoint": {"epoch": whole, "step": count, "is_best": switch},
    "warning": {"text": text},
    "end": {"status": one_of("done", "interrupted", "failed"), "error": maybe(text)},
}  # fmt: skip
OPTIONAL: dict[str, Test] = {
    "schema": count, "step": count, "epoch": maybe(whole),
    "simulated": switch, "images_per_second": positive, "data_seconds": seconds, "step_seconds": list_of(seconds),
    "first_step_seconds": seconds, "phase_seconds": table_of(seconds), "host_reads": either(number, table_of(number)),
    "peak_bytes": maybe(count), "line": count,
}  # fmt: skip
# A line with the metrics of a rank, a line about an image that it skipped, and the record of its failure.
RANK: dict[str, Test] = {
    "rank": count, "pid": whole, "time": seconds, "step": count, "loss": maybe(number), "interval_steps": count_from_1,
    "own_seconds": seconds, "interval_seconds": positive,
}  # fmt: skip
SKIPPED: dict[str, Test] = {"image": text, "reason": text}
FAILURE: dict[str, Test] = {"rank": count, "time": seconds, "host": text, "error": text, "traceback": text,
                            "exit_code": whole, "has_lost_peers": switch}  # fmt: skip

PROCESS: dict[str, Test] = {"host": text, "pid": whole, "process": text}

DOCUMENTS: dict[str, dict[str, Test]] = {  # for config.json, see runs/run.py
    "env.json": {
        **PROCESS, "simulated": switch, "device": text, "world_size": count_from_1, "hardware": text,
        "versions": table_of(maybe(text)), "commit": maybe(text), "argv": list_of(text), "executable": text,
        "cwd": text, "started": text, "amp_dtype": maybe(text), "tf32": maybe(switch), "channels_last": switch,
        "fused": switch, "compiled": switch, "num_cpus": count, "num_threads": count,
    },
    "report.json": {  # fields computed from the events; the others are read from their sources
        "num_lines": count, "events_checksum": text, "acc1": maybe(number), "acc5": maybe(number),
        "acc1_last": maybe(number), "acc5_last": maybe(number), "images_per_second": maybe(positive),
        "train_fps_min": maybe(positive), "train_fps_max": maybe(positive), "training_time": text,
        "data_is_fake": switch, "step_seconds_p50": maybe(seconds), "step_seconds_p90": maybe(seconds),
        "step_seconds_p99": maybe(seconds), "num_measured_steps": count, "data_wait_share": maybe(number),
        "num_intervals": count, "phase_seconds": maybe(table_of(number)), "host_reads": maybe(table_of(number)),
        "first_step_seconds": maybe(seconds), "peak_bytes": maybe(count),
        "warnings": list_of(text),
    },
    "launch.json": {**PROCESS, "inode": text, "argv": list_of(text), "command": list_of(text)},
    "bench.json": {"results": list_of(record(
        {"way": text, "batch_size": count_from_1, "num_turns": count, "images_per_second": maybe(number),
         "ratio": maybe(number), "device": record({"hardware": text, "simulated": switch, "amp_dtype": maybe(text)})},
        flop_per_image=maybe(count), peak_flop_per_second=maybe(number),
    ))},
}  # fmt: skip


def checksum(content: Content) -> str:
    """The checksum of all fields, in order."""
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def with_checksum(content: Content) -> Content:
    return {**content, CHECK: checksum(content)}


def parse(data: bytes) -> Content | None:
    """Parse a JSON object in UTF-8; None for anything else or deeper nesting than vgglab writes."""
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse)  # from bytes, loads would guess the encoding
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    # With this few brackets, it cannot be nested too deeply.
    is_shallow = data.count(b"{") + data.count(b"[") <= MAX_NESTING or _is_shallow(content, MAX_NESTING)
    return content if isinstance(content, dict) and is_shallow else None


def _is_shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def is_intact(line: bytes) -> bool:
    """Whether a line is unchanged, byte for byte, according to its checksum; faster than ``has_changed``."""
    body, found, check = line.rpartition(b', "check": "')
    return found != b"" and check == b'%08x"}\n' % zlib.crc32(b"}", zlib.crc32(body))


def has_changed(content: Content) -> bool:
    """Remove the checksum from ``content``; return whether it does not match."""
    return CHECK in content and content.pop(CHECK) != checksum(content)


def event_in(line: bytes, needs_checksum: bool = False) -> Content | None:
    """Parse a line of ``events.jsonl``; None if it is damaged or not an event. The field ``line`` is its number."""
    content = parse(line)
    # Line numbers and checksums were introduced together: a line with only a number has been edited.
    is_without = content is not None and CHECK not in content and (needs_checksum or "line" in content)
    if content is None or is_without:
        return None
    if is_intact(line):
        del content[CHECK]
    elif has_changed(content):
        return None
    kind = content.get("event")
    if not isinstance(kind, str) or not seconds(content.get("seconds")):
        return None
    return _checked(line, content, EVENTS.get(kind, {}))


def line_in(line: bytes, needed: dict[str, Test]) -> Content | None:
    """Parse a line or document; None if it is damaged or one of the ``needed`` fields is missing or invalid."""
    content = parse(line)
    return None if content is None or has_changed(content) else _checked(line, content, needed)


def _checked(line: bytes, content: Content, needed: dict[str, Test]) -> Content | None:
    if not content.keys() >= needed.keys():
        return None
    for name, value in content.items():
        test = needed.get(name) or OPTIONAL.get(name)
        if test and not test(value):
            return None
    is_plain = line.isascii() and b"\\" not in line and b"\x7f" not in line  # as nearly all lines are
    return content if is_plain else printable(content)


class Document(Content):
    """The fields of a file such as ``config.json``. Raises UserError on access to a missing field."""

    def __init__(self, file: Path, content: Content, damage: list[str]) -> None:
        super().__init__(content)
        self.file = file
        self.damage = damage  # one phrase per problem
        self.has_checksum = False

    def __missing__(self, name: str) -> None:
        raise UserError(f"{self.file}: has no valid {name}; the run directory is damaged")


def read_document(file: Path) -> Document:
    """Read a JSON file, except fields of a wrong type; empty if there is none. Raises UserError if not JSON."""
    if not exists(file):
        return Document(file, {}, [])
    data = read_bytes(file)
    content = None if data is None else parse(data)
    if content is None:
        raise UserError(f"{file}: is damaged; the run cannot be read")
    has_checksum = CHECK in content
    damage = [f"{file.name}: was changed after it was written"] if has_changed(content) else []
    tests = DOCUMENTS.get(file.name, {})
    left_out = [name for name, value in content.items() if name in tests and not tests[name](value)]
    damage += [f"{file.name}: {printable(name)} has the wrong type and is ignored" for name in left_out]
    document = Document(file, printable({name: v for name, v in content.items() if name not in left_out}), damage)
    document.has_checksum = has_checksum
    return document


def readable_document(file: Path) -> Document:
    """Like ``read_document``, but a file that cannot be read gives an empty document with the reason in ``damage``."""
    try:
        return read_document(file)
    except UserError:
        return Document(file, {}, [f"{file.name}: cannot be read"])


def write_document(file: Path, content: Content) -> None:
    """Write a document completely or not at all. Raises OSError."""
    beside = file.with_suffix(".tmp")
    with open(beside, "wb", opener=refusing_links) as target:
        target.write(json.dumps(with_checksum(content), indent=2).encode() + b"\n")
    beside.replace(file)


def append_line(file: Path, content: Content) -> None:
    """Append a line; after an incomplete line, start a new one. Raises OSError, after which later calls may succeed."""
    line = json.dumps(with_checksum(content)).encode() + b"\n"
    with open(file, "a+b", buffering=0, opener=refusing_links) as lines:
        if lines.seek(0, os.SEEK_END):
            lines.seek(-1, os.SEEK_END)
            line = b"\n" * (lines.read(1) != b"\n") + line
        if lines.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finite(value: Any) -> Any:
    """The value, or None for a number that JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
