"""Write a run directory; ``run.py`` describes its files."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, NoReturn, Sequence

from vgglab.data.decode import DECODERS
from vgglab.dist import interrupts, ranks
from vgglab.dist.processes import identity
from vgglab.dist.ranks import STACK_SIGNAL
from vgglab.errors import UserError
from vgglab.runs import checkpoint
from vgglab.runs.run import LOCK_FILE, RUN_FILES, SCHEMA_VERSION, Run, make_run_dir
from vgglab.storage import lock
from vgglab.storage.events import Event, EventFile
from vgglab.storage.files import nofollow_opener, write_errors
from vgglab.storage.schema import append_line, finite_or_none, write_document
from vgglab.version import __version__

if TYPE_CHECKING:
    from vgglab.trainer import Trainer

DISK_SPACE_ADVICE = "free some disk space (or remount the disk as writable)"


class RankWriter:
    """Writes the files of one rank: its log and metrics. Ignores events; ``RunWriter`` writes those, on rank 0."""

    def __init__(self, path: Path, rank: int, is_simulated: bool = False) -> None:
        self.path, self.rank = path, rank
        self.process_started = ranks.PROCESS_STARTED  # on the clock of time.monotonic
        self.resume_advice = ranks.resume_advice(path)
        self._skipped: set[str] = set()
        self._extra_fields = {"simulated": True} if is_simulated else {}  # added to all data from a simulated card
        self.lost: dict[str, int] = {}  # number of failed writes, by the name of what was lost
        self.lost_last_checkpoint = ""  # why the checkpoint of the last step could not be written; else empty

    def event(self, kind: str, **values: Any) -> None:
        pass

    def stop_requested(self) -> bool:
        """Whether this rank was asked to save and stop."""
        return interrupts.stop_requested()

    def stop(self, message: str = "") -> NoReturn:
        """Stop the run on request; rank 0 passes on what was saved and how to resume."""
        raise interrupts.StopRequested(message if self.rank == 0 else "")

    def write_failed(self, what: str, warning: str) -> None:
        """Count a failed write and warn the first time; training continues."""
        self.lost[what] = self.lost.get(what, 0) + 1
        if self.lost[what] == 1:
            self.event("warning", text=warning)

    @property
    def has_lost_checkpoints(self) -> bool:
        """Whether the latest checkpoint could not be written."""
        return bool(self.lost_last_checkpoint or "checkpoints" in self.lost)

    def unwritten_message(self) -> str:
        """The final message of a run: what could not be written and how to continue; else empty."""
        unwritten = ", ".join(f"{number} {name}" if number > 1 else name for name, number in self.lost.items())
        if self.lost_last_checkpoint:
            suffix = f"; also not written: {unwritten}" if unwritten else ""
            return f"{self.lost_last_checkpoint}{suffix}; {DISK_SPACE_ADVICE}, then {self.resume_advice}"
        if unwritten:
            advice = f"{DISK_SPACE_ADVICE}, then run python -m vgglab.report {self.path}"
            return f"{self.path}: training finished; not written: {unwritten}; {advice}"
        return ""

    def save_checkpoint(self, trainer: Trainer, is_best: bool = False) -> None:
        pass

    def skipped(self, image: str, reason: str) -> None:
        """Record in ``log/skipped-rank<r>.jsonl`` that this rank has skipped an image; repetitions are ignored."""
        if image in self._skipped:
            return
        self._skipped.add(image)
        self._append(f"log/skipped-rank{self.rank}.jsonl", {"image": image, "reason": reason})
        if len(self._skipped) == 1:
            text = f"skipped {image} ({reason}); all skipped images are listed in {self.path / 'log'}"
            self.event("warning", text=text)

    def rank_event(self, **values: Any) -> None:
        """Append a line to the metrics of this rank."""
        line = {"rank": self.rank, "pid": os.getpid(), "time": round(time.time(), 3)}
        line.update({key: finite_or_none(value) for key, value in values.items()}, **self._extra_fields)
        self._append(f"log/rank{self.rank}.jsonl", line)

    def _append(self, name: str, content: Event) -> None:
        try:
            append_line(self.path / name, content)
        except OSError as error:
            text = (
                f"{self.path / name} cannot be written ({error.strerror}); lines are lost until it can be written again"
            )
            self.write_failed(f"lines of {name}", text)

    @contextlib.contextmanager
    def record_output(self) -> Iterator[None]:
        """Copy the output of this process to ``log/rank<r>.txt``, unless a launcher already redirects it there."""
        file = self.path / "log" / f"rank{self.rank}.txt"
        log = None  # if the output is already redirected there
        if not (file.exists() and os.path.samestat(os.fstat(1), file.stat())):
            with write_errors(file):
                log = open(file, "ab", buffering=0, opener=nofollow_opener)  # noqa: SIM115
        with log or contextlib.nullcontext():
            # The handler is in C, so it works even in a hanging collective, where Python's handlers do not run.
            faulthandler.register(STACK_SIGNAL, file=log or 1)
            was_enabled = faulthandler.is_enabled()
            if log:
                faulthandler.enable(file=log)
            streams = sys.stdout, sys.stderr

            def on_error(error: OSError) -> None:
                text = f"{file} cannot be written ({error.strerror}); some output is not saved"
                self.write_failed(f"lines of log/{file.name}", text)

            sys.stdout, sys.stderr = _Tee(sys.stdout, log, on_error), _Tee(sys.stderr, log, on_error)
            try:
                yield
            except Exception:
                with contextlib.suppress(OSError):
                    if log:
                        log.write(traceback.format_exc().encode(errors="backslashreplace"))
                raise
            finally:
                faulthandler.unregister(STACK_SIGNAL)
                if log:
                    faulthandler.disable()
                    if was_enabled and sys.__stderr__ is not None:
                        faulthandler.enable(sys.__stderr__)
                signal.signal(STACK_SIGNAL, signal.SIG_IGN)  # else a late request would kill the rank
                sys.stdout, sys.stderr = streams


class RunWriter(RankWriter):
    """Writes a run directory; used on rank 0 only.

    ``listeners`` are called with each event after it is written; ``close`` closes them. With ``is_continued``, the
    writer appends to an existing run; if steps are repeated, readers keep only the later events.
    """

    def __init__(
        self, path: Path, listeners: Sequence[Any] = (), is_simulated: bool = False, is_continued: bool = False
    ) -> None:
        super().__init__(path, 0, is_simulated)
        self.listeners = listeners
        self._is_new = not is_continued
        self._started = time.monotonic()
        self._num_lines = 0  # including lines that could not be written, so that a reader sees the gap
        if not is_continued:
            make_run_dir(path)
        with write_errors(path):
            try:
                self._lock = lock.Lock(path / LOCK_FILE)
            except lock.LockHeld:
                raise UserError(f"--run-dir {path}: {Run(path).writer()}") from None
            self.has_lock = self._lock.is_held  # so that no second run can write here
            os.close(nofollow_opener(str(path / "events.jsonl"), os.O_CREAT | os.O_WRONLY))  # now it is a run
        if is_continued:  # after taking the lock, because an earlier writer may have added lines until then
            events = EventFile(path / "events.jsonl")
            self._started -= max((event["seconds"] for event in events.read()[-1:]), default=0.0)
            self._num_lines = events.next_line_number()

    def write_settings(self, config: dict[str, Any], device: dict[str, Any], world_size: int) -> None:
        """Write ``config.json`` and ``env.json``; ``device`` is the result of ``Device.describe``."""
        try:
            with write_errors(self.path):
                write_document(self.path / "config.json", {**config, **self._extra_fields})
                write_document(self.path / "env.json", _environment(device, world_size))
        except UserError:
            if self._is_new:
                self._remove()
            raise

    def _remove(self) -> None:
        """Delete the files of a run that could not start, so that the same command works once there is disk space."""
        for name in (*RUN_FILES, LOCK_FILE):
            for file in ((self.path / name).with_suffix(".tmp"), self.path / name):
                with contextlib.suppress(OSError):
                    file.unlink()
        for folder in (self.path / "log", self.path):  # a folder with other files in it is kept
            with contextlib.suppress(OSError):
                folder.rmdir()

    def write_report(self, report: dict[str, Any]) -> None:
        try:
            write_document(self.path / "report.json", report)
        except OSError as error:
            self.write_failed("report.json", f"{self.path / 'report.json'} cannot be written ({error.strerror})")

    def event(self, kind: str, **values: Any) -> None:
        """Append an event: ``kind``, seconds since the start, and ``values``; non-finite numbers become null."""
        event: Event = {"event": kind, "seconds": round(time.monotonic() - self._started, 3)}
        if kind == "start":
            event["schema"] = SCHEMA_VERSION
        event.update({key: finite_or_none(value) for key, value in values.items()}, **self._extra_fields)
        self._append("events.jsonl", {**event, "line": self._num_lines})
        self._num_lines += 1
        for listener in self.listeners:
            try:
                listener(event)
            except OSError as error:
                name = type(listener).__name__.lower()
                self.write_failed(name, f"{name} cannot be written ({error.strerror}); training continues")

    def save_checkpoint(self, trainer: Trainer, is_best: bool = False) -> None:
        """Write a checkpoint.

        If that fails, training continues with a warning; if it was the last checkpoint of the run, the run fails.

        Raises:
            UserError: a weight is not finite.
        """
        folder, state = self.path / "checkpoints", trainer.state
        try:
            checkpoint.save(folder, trainer, is_best)
        except checkpoint.SaveError as error:
            backup = "the previous checkpoint is intact" if (folder / "last.pt").exists() else "there is no earlier one"
            text = f"the checkpoint of step {state.step} was not written ({error}); {backup}"
            if state.epoch == trainer.config.epochs:
                self.lost.pop("checkpoints", None)  # reported in the final message instead
                self.lost_last_checkpoint = f"{folder}: {text}"
            else:
                self.write_failed("checkpoints", text)
                if is_best:  # later checkpoints replace last.pt, but not best.pt
                    text = f"best.pt does not contain the weights of step {state.step}, the best evaluation so far"
                    self.event("warning", text=text)
        else:
            self.lost.pop("checkpoints", None)  # this checkpoint replaces the lost ones
            self.event("checkpoint", epoch=state.epoch - (state.images == 0), step=state.step, is_best=is_best)

    def close(self) -> None:
        """Close the listeners and release the lock, so that another process may write."""
        self._lock.close()
        for listener in self.listeners:
            listener.close()


class _Tee:
    """A text stream that keeps a copy of its output in a log. A failed write does not end the run."""

    def __init__(self, stream: Any, log: Any, on_error: Callable[[OSError], None]) -> None:
        """``log`` is None if the stream already is the log. ``on_error`` is called when a write has failed."""
        self._stream, self._log, self._on_error = stream, log, on_error

    def write(self, text: str) -> int:
        if self._log is not None and "\r" not in text:  # progress bars are redrawn on the screen only
            try:
                self._log.write(text.encode(errors="backslashreplace"))
            except OSError as error:
                self._on_error(error)
        try:
            self._stream.write(text)
        except AttributeError:  # the process has no such stream
            pass
        except OSError as error:
            if self._log is None:
                self._on_error(error)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _environment(device: dict[str, Any], world_size: int) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"vgglab": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "torchvision", "numpy", *(decoder.package for decoder in DECODERS.values())):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        **device,
        "world_size": world_size,
        "versions": {**versions, **device.get("versions", {})},
        "commit": _git_commit(),
        "argv": sys.argv,
        "executable": sys.executable,
        "cwd": os.getcwd(),
        **identity(os.getpid()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that contains this file, with ``-dirty`` if there are changes; None outside one."""
    import subprocess

    package = Path(__file__).resolve().parent.parent
    if not (package.parent / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=package, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
