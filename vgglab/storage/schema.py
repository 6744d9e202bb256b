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
from vgglab.storage.files import nofollow_opener, read_bytes

Content = dict  # of a line or a document
Validator = Callable[[Any], bool]
CHECK = "check"
# Beyond these, arithmetic and the axes of figures overflow.
MAX_SECONDS = 1e12  # seconds, or images per second
MIN_DIVISOR = 1e-12  # the smallest number accepted as a divisor
MAX_INT = 10**15
MAX_FLOAT = 1e40  # float32 ends at 3.4e38
MAX_NESTING = 8  # levels of nested objects and lists


def text(value: Any) -> bool:
    return isinstance(value, str)


def boolean(value: Any) -> bool:
    return isinstance(value, bool)


def number(value: Any) -> bool:
    return abs(value) < MAX_FLOAT if type(value) is float else integer(value)


def seconds(value: Any) -> bool:
    return type(value) in (float, int) and 0 <= value < MAX_SECONDS


def positive(value: Any) -> bool:
    return type(value) in (float, int) and MIN_DIVISOR < value < MAX_SECONDS


def integer(value: Any) -> bool:
    return type(value) is int and abs(value) < MAX_INT


def count(value: Any) -> bool:
    return integer(value) and value >= 0


def count_from_1(value: Any) -> bool:
    return integer(value) and value >= 1


def null(value: Any) -> bool:
    return value is None


def nullable(validator: Validator) -> Validator:
    return any_of(null, validator)


def any_of(*validators: Validator) -> Validator:
    return lambda value: any(validator(value) for validator in validators)


def one_of(*words: str) -> Validator:
    return lambda value: value in words


def list_of(validator: Validator) -> Validator:
    return lambda value: isinstance(value, list) and all(map(validator, value))


def record(required: dict[str, Validator], **optional: Validator) -> Validator:
    """A validator for a JSON object that has the fields ``required`` and may have those in ``optional``."""
    validators = {**optional, **required}
    return lambda value: (
        isinstance(value, dict)
        and value.keys() >= required.keys()
        and all(validators[name](item) for name, item in value.items() if name in validators)
    )


def dict_of(validator: Validator, *names: str) -> Validator:
    """A validator for a JSON object that has the keys ``names`` and whose values all pass ``validator``."""
    return lambda value: isinstance(value, dict) and value.keys() >= set(names) and all(map(validator, value.values()))


# The required fields of each event, and optional fields of any event.
EVENTS: dict[str, dict[str, Validator]] = {
    "start": {
        "data": text, "is_fake": boolean, "num_train_images": count, "num_eval_images": count,
        "num_classes": count_from_1, "num_parameters": count, "epochs": count, "first_epoch": count,
        "first_step": count, "num_steps": count, "steps_per_epoch": count,
        "best": nullable(dict_of(number, "acc1", "acc5")),
    },
    "train": {
        "epoch": count, "step": count, "loss": nullable(number), "acc1": nullable(number), "lr": number,
        "is_measured": boolean, "interval_images": count, "interval_steps": count_from_1, "interval_seconds": positive,
    },
    "eval_start": {"epoch": nullable(integer), "num_batches": count},
    "eval": {
        "epoch": nullable(integer), "step": count, "loss": nullable(number), "acc1": number, "acc5": number,
        "num_images": count,
    },
    "checkpoint": {"epoch": integer, "step": count, "is_best": boolean},
    "warning": {"text": text},
    "end": {"status": one_of("done", "interrupted", "failed"), "error": nullable(text)},
}  # fmt: skip
OPTIONAL: dict[str, Validator] = {
    "schema": count, "step": count, "epoch": nullable(integer),
    "simulated": boolean, "images_per_second": positive, "data_seconds": seconds, "step_seconds": list_of(seconds),
    "first_step_seconds": seconds, "phase_seconds": dict_of(seconds), "host_reads": any_of(number, dict_of(number)),
    "peak_bytes": nullable(count), "scalars": dict_of(nullable(number)), "line": count,
}  # fmt: skip
_ANY_EVENT: dict[str, Validator] = {"event": text, "seconds": seconds}
_EVENT_RECORDS = {kind: record({**_ANY_EVENT, **fields}, **OPTIONAL) for kind, fields in EVENTS.items()}
_OTHER_EVENT_RECORD = record(_ANY_EVENT, **OPTIONAL)  # an event that another version writes
# A line with the metrics of a rank, a line about an image that it skipped, and the record of its failure.
RANK_FIELDS: dict[str, Validator] = {
    "rank": count, "pid": integer, "time": seconds, "step": count, "loss": nullable(number),
    "interval_steps": count_from_1, "own_seconds": seconds, "interval_seconds": positive,
}  # fmt: skip
RANK = record(RANK_FIELDS, **OPTIONAL)
SKIPPED = record({"image": text, "reason": text}, **OPTIONAL)
FAILURE = record({
    "rank": count, "time": seconds, "host": text, "error": text, "traceback": text, "exit_code": integer,
    "has_lost_peers": boolean,
}, **OPTIONAL)  # fmt: skip

PROCESS: dict[str, Validator] = {"host": text, "pid": integer, "process": text}

DOCUMENTS: dict[str, dict[str, Validator]] = {  # for config.json see runs/run.py
    "env.json": {
        **PROCESS, "simulated": boolean, "device": text, "world_size": count_from_1, "hardware": text,
        "versions": dict_of(nullable(text)), "commit": nullable(text), "argv": list_of(text), "executable": text,
        "cwd": text, "started": text, "amp_dtype": nullable(text), "tf32": nullable(boolean), "channels_last": boolean,
        "fused": boolean, "compiled": boolean, "num_cpus": count, "num_threads": count,
    },
    "launch.json": {**PROCESS, "inode": text, "argv": list_of(text), "command": list_of(text)},
    "bench.json": {"results": list_of(record(
        {"way": text, "batch_size": count_from_1, "num_turns": count, "images_per_second": nullable(number),
         "ratio": nullable(number),
         "device": record({"hardware": text, "simulated": boolean, "amp_dtype": nullable(text)})},
        flop_per_image=nullable(count), peak_flop_per_second=nullable(number),
    ))},
    "report.json": {  # the metrics, without the settings
        "acc1": nullable(number), "acc5": nullable(number), "acc1_last": nullable(number),
        "acc5_last": nullable(number), "images_per_second": nullable(positive), "train_fps_min": nullable(positive),
        "train_fps_max": nullable(positive), "training_time": text, "step_seconds_p50": nullable(seconds),
        "step_seconds_p90": nullable(seconds), "step_seconds_p99": nullable(seconds), "num_measured_steps": count,
        "num_intervals": count, "data_wait_share": nullable(number), "phase_seconds": nullable(dict_of(number)),
        "host_reads": nullable(dict_of(number)), "first_step_seconds": nullable(seconds),
        "peak_bytes": nullable(count), "data_is_fake": boolean, "warnings": list_of(text), "num_lines": count,
        "events_checksum": text, "scalars": nullable(dict_of(nullable(number))),
    },
}  # fmt: skip
NEWER_METRICS = {"scalars"}  # missing in reports of earlier versions, which stay valid


def checksum(content: Content) -> str:
    """The checksum of all fields; it depends on their order."""
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def with_checksum(content: Content) -> Content:
    return {**content, CHECK: checksum(content)}


def parse(data: bytes) -> Content | None:
    """Parse a JSON object in UTF-8 with at most ``MAX_NESTING`` levels; return None for anything else."""
    try:
        content = _decode(data.decode("utf-8"))
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


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_decode = json.JSONDecoder(parse_constant=_reject).decode  # json.loads would create a decoder for each line


def is_intact(line: bytes) -> bool:
    """Whether a line is unchanged, byte for byte, according to its checksum; faster than ``checksum``."""
    body, separator, check = line.rpartition(b', "check": "')
    return separator != b"" and check == b'%08x"}\n' % zlib.crc32(b"}", zlib.crc32(body))


def is_event(content: Content) -> bool:
    kind = content.get("event")
    return isinstance(kind, str) and _EVENT_RECORDS.get(kind, _OTHER_EVENT_RECORD)(content)


def parse_line(line: bytes, validator: Validator, needs_checksum: bool = False) -> Content | None:
    """Parse a line or document; None if it is damaged or invalid."""
    content = parse(line)
    if content is None:
        return None
    # Line numbers and checksums were introduced together: a line with only a number has been edited.
    lacks_checksum = CHECK not in content and (needs_checksum or "line" in content)
    has_checksum, recorded = CHECK in content, content.pop(CHECK, None)
    has_changed = has_checksum and not is_intact(line) and recorded != checksum(content)
    if lacks_checksum or has_changed or not validator(content):
        return None
    is_plain = line.isascii() and b"\\" not in line and b"\x7f" not in line  # as nearly all lines are
    return content if is_plain else printable(content)


class Document(Content):
    """The fields of a file such as ``config.json``. Raises UserError on access to a missing field."""

    def __init__(self, file: Path, content: Content, damage: list[str], has_checksum: bool = False) -> None:
        """``damage``: one phrase per problem."""
        super().__init__(content)
        self.file, self.damage, self.has_checksum = file, damage, has_checksum

    def __missing__(self, name: str) -> None:
        raise UserError(f"{self.file}: has no valid {name}; the run directory is damaged")


def read_document(file: Path) -> Document:
    """Read a JSON file, omitting fields of the wrong type; return an empty document if there is no file.

    Raises UserError if the file cannot be read or is not a valid JSON object.
    """
    if not os.path.exists(file):
        return Document(file, {}, [])
    data = read_bytes(file) or b""  # which is not valid either
    content = parse(data)
    if content is None:
        raise UserError(f"{file}: is damaged; the run cannot be read")
    has_checksum = CHECK in content
    has_changed = has_checksum and content.pop(CHECK) != checksum(content)
    damage = [f"{file.name}: was changed after it was written"] if has_changed else []
    validators = DOCUMENTS.get(file.name, {})
    invalid = [name for name, value in content.items() if name in validators and not validators[name](value)]
    damage += [f"{file.name}: {printable(name)} has the wrong type and is ignored" for name in invalid]
    fields = {name: value for name, value in content.items() if name not in invalid}
    return Document(file, printable(fields), damage, has_checksum)


def try_read_document(file: Path) -> Document:
    """Like ``read_document``, but a file that cannot be read gives an empty document with the reason in ``damage``."""
    try:
        return read_document(file)
    except UserError:
        return Document(file, {}, [f"{file.name}: cannot be read"])


def write_document(file: Path, content: Content) -> None:
    """Write a document atomically. Raises OSError."""
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb", opener=nofollow_opener) as target:
        target.write(json.dumps(with_checksum(content), indent=2).encode() + b"\n")
    temporary.replace(file)


def append_line(file: Path, content: Content) -> None:
    """Append a line. If the file ends in an incomplete line, that line is ended first.

    Raises OSError; later calls may still succeed.
    """
    line = json.dumps(with_checksum(content)).encode() + b"\n"
    with open(file, "a+b", buffering=0, opener=nofollow_opener) as lines:
        if lines.seek(0, os.SEEK_END):
            lines.seek(-1, os.SEEK_END)
            line = b"\n" * (lines.read(1) != b"\n") + line
        if lines.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finite_or_none(value: Any) -> Any:
    """The value, with None for each number that JSON cannot represent."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
