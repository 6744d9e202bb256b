"""Writing a run directory. What is in it: ``runs.py``. Standard library only."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Sequence

from vgglab.dist.processes import signature
from vgglab.errors import UserError
from vgglab.ranks import ASK_WHERE
from vgglab.runs import NO_WRITING, Event, Run, claim, write_json
from vgglab.version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"  # in the run directory; held by rank 0
Listener = Callable[[Event], None]


class RankWriter:
    """What every rank writes: its log and its own figures. The events are rank 0's; for the others they are nothing."""

    def __init__(self, path: Path, rank: int, is_simulated: bool = False) -> None:
        self.path = path
        self.rank = rank
        self._skipped: set[str] = set()
        self._mark = {"simulated": True} if is_simulated else {}  # on all that a simulated card has part in

    def event(self, kind: str, **values: Any) -> None:
        pass

    def skipped(self, image: str, reason: str) -> None:
        """Note an image that this rank has left out: once, in ``log/skipped-rank<r>.jsonl``."""
        if image in self._skipped:
            return
        self._skipped.add(image)
        file = self.path / "log" / f"skipped-rank{self.rank}.jsonl"
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"image": image, "reason": reason}) + "\n")
        if len(self._skipped) == 1:
            text = f"skipped {image} ({reason}); all that follow are listed in {file.parent}"
            self.event("warning", text=text)

    def rank_event(self, **values: Any) -> None:
        """Append a line to this rank's own file."""
        line = {"rank": self.rank, "pid": os.getpid(), "time": round(time.time(), 3)}
        line.update({key: finite(value) for key, value in values.items()}, **self._mark)
        with open(self.path / "log" / f"rank{self.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def recording_output(self) -> Iterator[None]:
        """Copy what this process prints into ``log/rank<r>.txt``, unless a launcher has it written there already."""
        file = self.path / "log" / f"rank{self.rank}.txt"
        if file.exists() and os.path.samestat(os.fstat(1), file.stat()):
            faulthandler.register(ASK_WHERE, file=1)
            yield
            return
        with open(file, "a", encoding="utf-8", errors="backslashreplace") as log:
            # Written from C, so it also works deep inside a collective that hangs, where Python's handlers wait.
            faulthandler.register(ASK_WHERE, file=log)
            had_handler = faulthandler.is_enabled()
            faulthandler.enable(file=log)
            screens = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = _Tee(sys.stdout, log), _Tee(sys.stderr, log)
            try:
                yield
            except Exception:
                traceback.print_exc(file=log)
                raise
            finally:
                faulthandler.unregister(ASK_WHERE)
                faulthandler.disable()
                if had_handler and sys.__stderr__ is not None:
                    faulthandler.enable(sys.__stderr__)
                signal.signal(ASK_WHERE, signal.SIG_IGN)  # unregistered, it would end a rank that was asked too late
                sys.stdout, sys.stderr = screens


class RunWriter(RankWriter):
    """Writes one run directory, on rank 0; ``listeners`` are called with each event after it is on disk.

    With ``is_continued`` it goes on writing one that is there: later lines of events supersede those of steps that
    are done again.
    """

    def __init__(
        self, path: Path, listeners: Sequence[Listener] = (), is_simulated: bool = False, is_continued: bool = False
    ) -> None:
        super().__init__(path, 0, is_simulated)
        self.listeners = list(listeners)
        self._started = time.monotonic()
        if is_continued:
            self._started -= max((event["seconds"] for event in Run(path).events()), default=0.0)
        else:
            claim(path)
        try:
            self._lock, self.has_lock = _lock(path)
            self._events = (path / "events.jsonl").open("a", encoding="utf-8")
            if is_continued:
                self._events.write("\n")  # ends a line that was cut short
        except OSError as error:
            raise UserError(f"{path}: {NO_WRITING} ({error.strerror})") from None

    def write_config(self, config: dict[str, Any]) -> None:
        write_json(self.path / "config.json", {**config, **self._mark})

    def write_env(self, device: dict[str, Any], world_size: int) -> None:
        """What ran where: ``device`` is the device's own description."""
        write_json(self.path / "env.json", _environment(device, world_size))

    def write_report(self, report: dict[str, Any]) -> None:
        write_json(self.path / "report.json", report)

    def event(self, kind: str, **values: Any) -> None:
        """Append one line: ``kind``, seconds since the start, ``values``; null for numbers that are not finite."""
        event: Event = {"event": kind, "seconds": round(time.monotonic() - self._started, 3)}
        event.update({key: finite(value) for key, value in values.items()}, **self._mark)
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        """End the events; listeners that hold files close them. From here on another process may write."""
        self._events.close()
        if self._lock is not None:
            self._lock.close()
        for listener in self.listeners:
            close = getattr(listener, "close", None)
            if close is not None:
                close()


def _lock(path: Path) -> tuple[IO[str] | None, bool]:
    """Make this process the only writer of a run directory for as long as it lives, however it ends.

    Returns:
        The open file that holds the lock, and whether there is one: not every file system can lock.

    Raises:
        UserError: another process is writing there.
    """
    if fcntl is None:
        return None, False
    file = (path / LOCK).open("a", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"--run-dir {path}: {Run(path).writer()}") from None
    except OSError:
        return file, False
    return file, True


class _Tee:
    """A text stream that writes to two; in all else it is the first."""

    def __init__(self, screen: Any, log: Any) -> None:
        self._screen, self._log = screen, log

    def write(self, text: str) -> int:
        if "\r" not in text:  # a progress bar's redrawing belongs on the screen only
            self._log.write(text)
            self._log.flush()
        with contextlib.suppress(OSError, AttributeError):  # a screen that has gone, or never was, ends no run
            self._screen.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self._screen.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._screen, name)


def finite(value: Any) -> Any:
    """None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment(device: dict[str, Any], world_size: int) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"vgglab": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "torchvision", "numpy", "pillow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    versions.update(device.pop("versions", {}))
    return {
        "simulated": device.pop("simulated"),
        "device": device.pop("device"),
        "world_size": world_size,
        **device,
        "versions": versions,
        "commit": _commit(),
        "argv": sys.argv,
        "executable": sys.executable,
        "cwd": os.getcwd(),
        **signature(os.getpid()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, with ``-dirty`` where it was changed."""
    import subprocess

    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
