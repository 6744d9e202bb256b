"""The run directory: the only interface between training and display.

    config.json    the final settings, written before the first step
    env.json       versions, commit, command line, hardware, whether it is simulated
    events.jsonl   one JSON object per line, append-only; the first has the schema version
    log/           rank<r>.txt: the output of each rank; rank<r>.jsonl: its metrics at each log line;
                   skipped-rank<r>.jsonl: the images it skipped; failure-rank<r>.json: why it failed;
                   launcher.txt: the output of the launcher and all ranks
    checkpoints/   last.pt, previous.pt and best.pt
    report.json    final metrics, computed from the files above (report.py)
    launch.json    the process that vgglab.launch started; absent if it was not used
    lock           held by rank 0 while it writes

``RunWriter`` (``writer.py``) writes it; ``Run`` reads it, even while the run is active. Standard library only.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import time
import uuid
from dataclasses import fields
from pathlib import Path
from typing import Any, Sequence

from vgglab.dist.processes import find_processes, is_alive, is_running, kill_all, request_stack
from vgglab.dist.ranks import failures, grace_period_seconds
from vgglab.errors import UserError, printable
from vgglab.runs.report import build_report
from vgglab.settings.config import Request
from vgglab.storage import schema
from vgglab.storage.events import Event, EventFile
from vgglab.storage.files import Stamp, inode_of, make_folder, read_tail, stamp, write_errors
from vgglab.storage.lock import holder
from vgglab.storage.schema import RANK, SKIPPED, Document, Validator, parse_line, read_document, try_read_document

SCHEMA_VERSION = 1
RUN_FILES = ("config.json", "env.json", "events.jsonl", "report.json", "checkpoints")
LOCK_FILE = "lock"  # held by rank 0 as long as it writes
LAUNCH_FILE = "launch.json"  # records the launched process, before the run has written anything itself
MAX_LOG_BYTES = 2**26  # the most that ``logs`` returns
MAX_SKIPPED_BYTES, MAX_SKIPPED_LISTS = 2**20, 128  # per list of skipped images (about 10,000 lines), number of lists
TAIL_BYTES = 4096  # how much of the end of a log is read
# Lines in log/<kind>*.jsonl: their validator, how much of each file is read, and the largest number of files.
LOG_LINES = {"skipped-rank": (SKIPPED, MAX_SKIPPED_BYTES, MAX_SKIPPED_LISTS), "rank": (RANK, TAIL_BYTES, None)}
NUM_RECENT = 8  # log lines per rank: enough to tell a slow rank from a brief delay
DATE = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}[+-]\d{4}")
END_STATUSES = ("done", "interrupted", "failed")
ACTIVE = ("starting", "running")  # statuses of a run that has not ended
_TYPES: dict[str, Validator] = {
    "int": schema.integer, "float": schema.number, "str": schema.text, "bool": schema.boolean, "None": schema.null
}  # fmt: skip


def _validator_for(annotation: str) -> Validator:
    return schema.any_of(*(_TYPES[name.strip()] for name in annotation.split("|")))


schema.DOCUMENTS["config.json"] = {
    **{item.name: _validator_for(str(item.type)) for item in fields(Request)},
    **dict.fromkeys(("batch_size", "world_size"), schema.count_from_1),
    **dict.fromkeys(("image_size", "num_classes"), schema.nullable(schema.count_from_1)),
}


def run_path(config: Request) -> Path:
    """The run directory: ``run_dir`` if set, else ``<output_dir>/runs/<time>-<data>-<model>-<device>x<ranks>-<id>``.

    A launcher names the folder before the device is known, so ``<device>`` can be ``auto``.
    """
    if config.run_dir:
        return Path(config.run_dir)
    timestamp = time.strftime("%Y%m%d-%H%M%S")
    data = Path(config.data_path).absolute().name[:40]
    name = f"{timestamp}-{data}-{config.model}-{config.device}x{config.world_size}-{uuid.uuid4().hex[:6]}"
    return Path(config.output_dir, "runs", name)


def has_run_files(path: Path) -> bool:
    """Whether the folder contains files of a run."""
    return any(os.path.lexists(path / name) for name in RUN_FILES)


def is_run_dir(path: Path) -> bool:
    """Whether the folder contains a run, including one that is still starting."""
    return has_run_files(path) or os.path.exists(path / LAUNCH_FILE)


def make_run_dir(path: Path) -> None:
    """Create the folder of a new run. Raises UserError if that fails or it already contains a run."""
    if has_run_files(path):
        raise UserError(f"--run-dir {path}: already contains a run; choose another folder")
    with write_errors(path):
        make_folder(path)
        make_folder(path / "log")


class Run:
    """Reads a run directory, while the run is active and after it has ended."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if the folder does not exist or contains no run."""
        self.path = Path(path).absolute()  # valid even after os.chdir
        self._events = EventFile(self.path / "events.jsonl")
        self._stamps: list[Stamp | None] = []  # of the files when ``valid_report`` last read them
        self._valid_report: Document | None = None
        if not is_run_dir(self.path):
            raise UserError(f"{self.path} is not a run directory")

    @property
    def name(self) -> str:
        """The name of the run's folder; for one of several seeds, ``<parent folder>/seed-<n>``."""
        is_in_series = self.path.name.startswith("seed-")
        return printable(f"{self.path.parent.name}/{self.path.name}" if is_in_series else self.path.name)

    @property
    def created(self) -> float:
        """When the first file was written, in seconds since 1970; used to sort runs."""
        files = [self.path / name for name in (LAUNCH_FILE, "config.json")]
        return min((file.stat().st_mtime for file in files if file.exists()), default=self.path.stat().st_mtime)

    @property
    def started(self) -> str:
        """When the run was started, such as ``2026-11-27T02:05:00+0000``; empty if ``env.json`` has no valid date."""
        text = self.env.get("started")
        return text if isinstance(text, str) and DATE.fullmatch(text) else ""

    @property
    def config(self) -> Document:
        return read_document(self.path / "config.json")

    @property
    def env(self) -> Document:
        return read_document(self.path / "env.json")

    def damage(self) -> list[str]:
        """Phrases about content that is missing, or ignored because it is damaged or not written by vgglab."""
        phrases: list[str] = []
        if self.valid_report() is None:
            try:
                phrases += self._events.damage(has_ended=self.status not in ACTIVE)
            except UserError as error:
                return [str(error)]
            has_events = bool(self._events.read())  # first: the documents are written before the first event
            documents = self._documents()
            if has_events:
                phrases += _document_damage(documents, self._events.has_checksums)
            num_missing = documents["report.json"].get("num_lines", 0) - self._events.next_line_number()
            if num_missing > 0:
                phrases.append(f"events.jsonl: {num_missing} line{'s' * (num_missing > 1)} missing at its end")
        for number, file in enumerate(self._files("skipped-rank")):
            if number >= MAX_SKIPPED_LISTS or file.stat().st_size > MAX_SKIPPED_BYTES:
                phrases.append(f"log/{file.name}: too long to read in full, so skipped images are undercounted")
        for kind in LOG_LINES:
            num_damaged = sum(line is None for lines in self._log_lines(kind) for line in lines)
            if num_damaged:
                phrases.append(f"log/{kind}*.jsonl: {num_damaged} damaged line{'s' * (num_damaged > 1)}, left out")
        return phrases

    def _documents(self) -> dict[str, Document]:
        return {name: try_read_document(self.path / name) for name in ("config.json", "env.json", "report.json")}

    @property
    def has_begun(self) -> bool:
        """Whether the run has written an event."""
        return self.valid_report() is not None or bool(self._events.read())

    def events_checksum(self) -> str:
        """The checksum of the whole ``events.jsonl``."""
        return self._events.checksum()

    def num_lines(self) -> int:
        """The number of event lines written, including those that are now damaged or missing."""
        return self._events.next_line_number()

    def events(self, kind: str | None = None) -> Sequence[Event]:
        """All events so far, or those of one kind, except a line that is still being written.

        Returns a list; for more than 20,000 events, a sequence that reads training events on access.

        If the run was resumed from a checkpoint, what the earlier attempt wrote after that checkpoint is left out.
        """
        return self._events.read(kind)

    @property
    def status(self) -> str:
        """``starting``, ``running``, ``done``, ``interrupted`` or ``failed``."""
        report = self.valid_report()
        events = self._events.read() if report is None else []
        latest = events[-1] if events else None
        if report is not None or (latest is not None and latest["event"] == "end"):
            return "starting" if self._was_relaunched() else (report or latest or {})["status"]
        if self._is_dead() or not is_run_dir(self.path):
            return "failed"  # killed before it could record its end, or removed
        return "starting" if latest is None else "running"

    @property
    def is_here(self) -> bool:
        """Whether the run was started on this machine."""
        rank_0, launcher = self._recorded_processes()
        return (rank_0 or launcher).get("host") == socket.gethostname()

    def _recorded_processes(self) -> tuple[Document, Document]:
        """Rank 0, and the process that ``vgglab.launch`` started; empty if they are not recorded."""
        return try_read_document(self.path / "env.json"), self._launcher()

    def _launcher(self) -> Document:
        """The process that ``vgglab.launch`` started here; empty if there is none or if this folder is a copy."""
        launcher = try_read_document(self.path / LAUNCH_FILE)
        if "inode" in launcher and launcher["inode"] != inode_of(self.path):  # earlier versions did not record it
            launcher.clear()
        return launcher

    def writer(self) -> str:
        """A message that says which process is writing here, and what to do about it."""
        rank_0, launcher = self._recorded_processes()
        process = launcher if is_running(launcher) and not is_running(rank_0) else rank_0 or launcher
        if not is_running(process) and holder(self.path / LOCK_FILE) == 0:
            return "the process that was writing there has just ended; try again"
        who = f"process {process.get('pid')} on {process.get('host')}"
        return f"{who} is writing there; vgglab.Run({str(self.path)!r}).watch() shows that run, and .stop() ends it"

    def _is_dead(self) -> bool:
        """Whether neither rank 0 nor the launched process is alive, as far as can be seen from this machine.

        Either can outlive the other: a launcher restarts ranks, and when a run is launched again in the same folder,
        ``env.json`` names the previous rank 0 until the new one is ready. If neither is recorded, the lock decides.
        """
        rank_0, launcher = self._recorded_processes()
        has_no_writer = holder(self.path / LOCK_FILE) == 0  # also true for a copy of an active run
        if not rank_0 and not launcher:
            return has_no_writer
        return self.is_here and not is_running(launcher) and (has_no_writer or not is_running(rank_0))

    def _was_relaunched(self) -> bool:
        """Whether the last end event belongs to an earlier launch in the same folder."""
        launched, events = self.path / LAUNCH_FILE, self.path / "events.jsonl"
        is_newer = launched.exists() and events.exists() and launched.stat().st_mtime > events.stat().st_mtime
        return is_newer and is_running(self._launcher())

    def report(self) -> dict[str, Any]:
        """The final metrics: from ``report.json`` if it matches the events, otherwise computed from them."""
        return build_report(self)

    def valid_report(self) -> Document | None:
        """``report.json`` if it is final and matches the events, which then need not be parsed; else None.

        The files are read again only if they have changed, because a table calls this several times for each run.
        """
        stamps = [stamp(self.path / name) for name in ("config.json", "env.json", "report.json", "events.jsonl")]
        if None in stamps or stamps != self._stamps:
            self._valid_report, self._stamps = self._read_valid_report(), stamps
        return self._valid_report

    def _read_valid_report(self) -> Document | None:
        documents = self._documents()
        saved = documents["report.json"]
        required = schema.DOCUMENTS["report.json"].keys() - schema.NEWER_METRICS
        is_complete = saved.has_checksum and saved.keys() >= required and not saved.damage
        is_final = saved.get("damage") == [] and saved.get("status") in END_STATUSES
        if not is_complete or not is_final or _document_damage(documents, has_checksums=True):
            return None
        sources = {**documents["config.json"], **documents["env.json"]}
        is_current = all(saved.get(name) == sources.get(name) for name in ("batch_size", "world_size", "simulated"))
        return saved if is_current and self._events.has_checksum(saved["events_checksum"]) else None

    def logs(self, rank: int | str = 0) -> str:
        """The output of a rank so far; ``"launcher"`` for the output of the launcher."""
        return self._log_tail(rank, MAX_LOG_BYTES)

    def last_lines(self, rank: int | str, count: int) -> list[str]:
        """The last lines of ``logs(rank)``, from the last few kilobytes of the file."""
        return self._log_tail(rank, TAIL_BYTES).splitlines()[-count:]

    def _log_tail(self, rank: int | str, num_bytes: int) -> str:
        name = "launcher.txt" if rank == "launcher" else f"rank{rank}.txt"
        return printable(read_tail(self.path / "log" / name, num_bytes).decode("utf-8", errors="replace"))

    def _files(self, kind: str) -> list[Path]:
        return sorted(file for file in (self.path / "log").glob(f"{kind}*.jsonl") if file.is_file())

    def _log_lines(self, kind: str) -> list[list[dict[str, Any] | None]]:
        """The last complete lines of each ``log/<kind>*.jsonl``, parsed; None in place of a damaged line."""
        validator, num_bytes, max_files = LOG_LINES[kind]
        parsed = []
        for file in self._files(kind)[:max_files]:
            tail = read_tail(file, num_bytes)
            lines = tail.splitlines(True)[1 if len(tail) == num_bytes else 0 :]
            complete = [line for line in lines if line.endswith(b"\n") and not line.isspace()]
            parsed.append([parse_line(line, validator) for line in complete])
        return parsed

    def ranks(self) -> list[dict[str, Any]]:
        """The latest metrics of each rank, in order; empty before the first log line."""
        return [events[-1] for events in self.recent_metrics()]

    def recent_metrics(self) -> list[list[dict[str, Any]]]:
        """The metrics of each rank at its last few log lines, newest last."""
        recent = []
        for lines in self._log_lines("rank"):
            events = [event for event in lines if event]
            # Ignore what an earlier process wrote, before the run was resumed in this directory.
            events = [event for event in events if event["pid"] == events[-1]["pid"]]
            if events and events[-1]["rank"] < self.env.get("world_size", math.inf):
                recent.append(events[-NUM_RECENT:])
        return sorted(recent, key=lambda events: events[-1]["rank"])

    def skipped(self) -> dict[str, str]:
        """The images that were skipped because they could not be read, with the reasons."""
        entries = [entry for lines in self._log_lines("skipped-rank") for entry in lines if entry]
        return {entry["image"]: entry["reason"] for entry in entries}

    def stacks(self) -> str:
        """The current Python stack of each rank on this machine, newest call first (Linux)."""
        stacks = []
        for metrics in self.ranks():
            stack = request_stack(metrics["pid"], self.path / "log" / f"rank{metrics['rank']}.txt")
            stacks.append(f"rank {metrics['rank']}:\n{stack or '  not running on this machine'}")
        return "\n".join(stacks) or "no rank has logged anything yet"

    def failures(self) -> list[dict[str, Any]]:
        """The failures of the ranks (``rank``, ``error``, ``traceback``, ...), root cause first."""
        return failures(self.path)

    def stop(self, grace_seconds: float | None = None) -> str:
        """Ask a run on this machine to save and stop; if ``vgglab.launch`` started it, kill it after the grace period.

        Returns:
            One line that says what was done.

        Raises:
            UserError: the run is active, but its process cannot be identified.
        """
        deadline, pids = time.monotonic() + grace_period_seconds(grace_seconds), self._processes_to_signal()
        if not pids and self.status in ACTIVE:
            process = f"process {self.env.get('pid')} on {self.env.get('host')}"
            raise UserError(
                f"{self.path}: cannot confirm that {process} belongs to this run; if it does, kill it on that host"
            )
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        kill_all(self.path)
        outcome = f"process {pids[0]} was asked to save and stop" if pids else "already ended"
        return f"{self.name}: {outcome}; status: {self.status}"

    def _processes_to_signal(self) -> list[int]:
        """The processes to signal, never process 1: those launched for this run, or the one that holds its lock.

        A process ID in a file is not enough, because somebody else may have written the file.
        """
        pids, env, launcher = find_processes(self.path), self.env, self._launcher()
        if is_running(launcher) and launcher["pid"] in pids:
            return [launcher["pid"]]
        is_writer = is_running(env) and holder(self.path / LOCK_FILE) == env["pid"] > 1
        return pids or ([env["pid"]] if is_writer else [])

    def checkpoint(self, which: str = "best") -> Path:
        """The path of the checkpoint ``best`` or ``last``. Raises UserError if there is none."""
        file = self.path / "checkpoints" / f"{which}.pt"
        if not file.exists():
            raise UserError(f"{self.path} has no {which} checkpoint")
        return file


def _document_damage(documents: dict[str, Document], has_checksums: bool) -> list[str]:
    """Damage in the JSON files; ``has_checksums``: whether the version that wrote them adds checksums."""
    phrases = []
    for name, document in documents.items():
        phrases += document.damage
        if not document and not document.damage and name != "report.json":
            phrases.append(f"{name}: is missing")
        elif document and has_checksums and not document.has_checksum:
            phrases.append(f"{name}: has no checksum; it was changed after it was written")
    return phrases
