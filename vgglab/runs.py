"""The run directory: the only thing that passes between doing and looking.

    config.json    the resolved settings, written before the first step
    env.json       versions, commit, command line, hardware, simulated or not
    events.jsonl   one JSON object a line, append-only; the first carries the schema version
    log/rank*.txt  what each rank printed
    checkpoints/   last.pt and best.pt
    report.json    final figures, derived from the lines above (report.py)
    launch.json    who started it, where that was vgglab.launch

``RunWriter`` writes it, from one process; ``Run`` reads it, from anywhere, also while it grows. Standard
library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
import traceback
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence

from vgglab.errors import UserError
from vgglab.version import __version__

if TYPE_CHECKING:
    from vgglab.config import Config

SCHEMA = 1
OURS = ("config.json", "env.json", "events.jsonl", "report.json", "checkpoints")
LAUNCHED = "launch.json"  # who started a run that cannot yet speak for itself
_NO_WRITING = "cannot be written; name another folder with --output-dir or --run-dir"
Event = dict  # what a line of events.jsonl holds
Listener = Callable[[Event], None]


def run_path(config: Config) -> Path:
    """Where this run goes: ``run_dir``, else ``<output_dir>/runs/<time>-<data>-<model>-<device>x<ranks>-<id>``.

    A launcher names the folder before anybody has looked at the machine: there ``<device>`` can be ``auto``.
    """
    if config.run_dir:
        return Path(config.run_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    data = (Path(config.data_path).name or Path(config.data_path).resolve().name)[:40]
    name = f"{stamp}-{data}-{config.model}-{config.device}x{config.world_size}-{uuid.uuid4().hex[:6]}"
    return Path(config.output_dir, "runs", name)


def claim(path: Path) -> None:
    """Make the folder of a new run. Raises UserError where it cannot be made or holds a run already."""
    try:
        if any((path / name).exists() for name in OURS):
            raise UserError(f"--run-dir {path}: holds a run already; name another folder")
        (path / "log").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {_NO_WRITING} ({error.strerror})") from None


class RunWriter:
    """Writes one run directory; ``listeners`` are called with each event after it is on disk."""

    def __init__(self, path: Path, listeners: Sequence[Listener] = (), is_simulated: bool = False) -> None:
        self.path = path
        self.listeners = list(listeners)
        self._mark = {"simulated": True} if is_simulated else {}  # on all that a simulated card has part in
        self._started = time.monotonic()
        claim(path)
        try:
            self._events = (path / "events.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: {_NO_WRITING} ({error.strerror})") from None

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
        event.update({key: _finite(value) for key, value in values.items()}, **self._mark)
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()
        for listener in self.listeners:
            listener(event)

    @contextlib.contextmanager
    def recording_output(self) -> Iterator[None]:
        """Copy what this process prints into ``log/rank0.txt``, unless a launcher has it written there already."""
        file = self.path / "log" / "rank0.txt"
        if file.exists() and os.path.samestat(os.fstat(1), file.stat()):
            yield
            return
        with open(file, "a", encoding="utf-8", errors="backslashreplace") as log:
            screens = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = _Tee(sys.stdout, log), _Tee(sys.stderr, log)
            try:
                yield
            except Exception:
                traceback.print_exc(file=log)
                raise
            finally:
                sys.stdout, sys.stderr = screens

    def close(self) -> None:
        """End the events; listeners that hold files close them."""
        self._events.close()
        for listener in self.listeners:
            close = getattr(listener, "close", None)
            if close is not None:
                close()


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


class SilentRun(RunWriter):
    """What every rank but the first writes to: nothing."""

    def __init__(self) -> None:
        self.path = Path(os.devnull)

    def event(self, kind: str, **values: Any) -> None:
        pass


class Run:
    """A run directory, read. Works while the run is going on, and after it is gone."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError where there is no such folder, or no run in it."""
        self.path = Path(path).absolute()  # to be found after a change of folder, too
        self._seen: list[Event] = []
        self._num_bytes_seen = 0
        if not any((self.path / name).exists() for name in (*OURS, LAUNCHED)):
            raise UserError(f"no run directory: {self.path}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})  # {self.status}"

    @property
    def config(self) -> dict[str, Any]:
        return _read_json(self.path / "config.json")

    @property
    def env(self) -> dict[str, Any]:
        return _read_json(self.path / "env.json")

    def events(self, kind: str | None = None) -> list[Event]:
        """All events so far, or those of one kind; a line that is still being written is left out."""
        self._read_on()
        return [event for event in self._seen if kind in (None, event["event"])]

    def _read_on(self) -> None:
        """Take in the lines that were added since the last look."""
        file = self.path / "events.jsonl"
        if not file.exists():
            return
        with file.open("rb") as lines:
            lines.seek(self._num_bytes_seen)
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                self._seen.append(json.loads(line))
                self._num_bytes_seen += len(line)

    @property
    def status(self) -> str:
        """``starting``, ``running``, or how it ended: ``done``, ``interrupted``, ``failed``."""
        events = self.events()
        if events and events[-1]["event"] == "end":
            return events[-1]["status"]
        if self._is_dead():
            return "failed"  # killed before it could say so
        return "running" if events else "starting"

    def _is_dead(self) -> bool:
        env = self.env or _read_json(self.path / LAUNCHED)
        if env.get("host") != socket.gethostname():
            return False  # not to be seen from here
        try:
            os.kill(env["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # somebody else's, and alive
            pass
        return False

    def report(self) -> dict[str, Any]:
        """The figures of ``report.json``, made anew from the events."""
        from vgglab.report import build_report

        return build_report(self)

    def logs(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        file = self.path / "log" / f"rank{rank}.txt"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def checkpoint(self, which: str = "best") -> Path:
        """``best`` or ``last``. Raises UserError where none was written."""
        file = self.path / "checkpoints" / f"{which}.pt"
        if not file.exists():
            raise UserError(f"{self.path} has no {which} checkpoint")
        return file

    def watch(self) -> None:
        """Show the run in a notebook: a live dashboard, or one picture where the front end has no widgets."""
        from vgglab.view.live import watch

        watch(self)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: Path, content: dict[str, Any]) -> None:
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(file)


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


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
        "host": socket.gethostname(),
        "pid": os.getpid(),
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
