"""Start a run from a notebook or a script: a process of its own, followed through its run directory.

The training never runs inside the kernel, so a cell that fails cannot hurt it; and it does not outlive
the kernel: the process holds the reading end of a pipe, and ends when the kernel that holds the other end does.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Generator, Sequence

from vgglab.config import parse
from vgglab.errors import RunFailed, UserError
from vgglab.runs import LAUNCHED, Run, claim, run_path, write_json

LEASH = "VGGLAB_LEASH"  # set for a launched process: stdin is its leash
STOP_GRACE_SECONDS = 10.0
NUM_LOG_LINES_SHOWN = 30


def launch(flags: str | Sequence[Any] = "", watch: bool = True, **settings: Any) -> LaunchedRun:
    """Train in a new process and show it; the run directory is there when this returns.

    In a live notebook this returns at once and leaves a dashboard; elsewhere (papermill, a script) it
    returns when the run has ended.

    Args:
        flags: as on the command line, e.g. ``"--data-path digits --epochs 2"``, or a list of them.
        watch: show the run while it goes on; without it this always returns at once.
        settings: the same flags as keywords, e.g. ``data_path="digits", epochs=2``; ``True`` sets a switch,
            ``None`` is as if it were not there.

    Raises:
        UserError: a flag that is unknown or out of range; or, later, whatever the run refuses.
        RunFailed: the run ended in an error (where this waits for it).
    """
    argv = shlex.split(flags) if isinstance(flags, str) else [str(flag) for flag in flags]
    argv += [_as_flag(name, value) for name, value in settings.items() if value is not None]
    config = parse(argv)
    path = run_path(config)
    run = LaunchedRun(path, _start(argv, path))
    if watch:
        run.watch()
    return run


def _as_flag(name: str, value: Any) -> str:
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def _start(argv: list[str], path: Path) -> subprocess.Popen:
    claim(path)
    with open(path / "log" / "rank0.txt", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "vgglab.train", *argv, f"--run-dir={path}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,  # the kernel's Ctrl-C is not the run's: stop() asks it properly
        )
    write_json(path / LAUNCHED, {"pid": process.pid, "host": socket.gethostname(), "argv": argv})
    return process


def _environment() -> dict[str, str]:
    """This process's, with the leash on; the package is found also where it is not installed."""
    environment = {**os.environ, LEASH: "1"}
    home = Path(__file__).resolve().parent.parent
    if home.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(home)]))
    return environment


class LaunchedRun(Run):
    """A run that this process has started. ``await run`` in a cell waits and keeps its Stop button alive."""

    def __init__(self, path: Path, process: subprocess.Popen) -> None:
        super().__init__(path)
        self.process = process
        self._was_stopped = False

    @property
    def status(self) -> str:
        has_ended = self.process.poll() is not None  # asked first: it may end while its events are read
        if has_ended and not self.events("end"):  # it could not say how it ended
            return "interrupted" if self._was_stopped else "failed"
        return super().status

    def wait(self, timeout_seconds: float | None = None) -> LaunchedRun:
        """Wait until the run has ended; interrupting the wait stops the run.

        Raises:
            UserError: the run refused its flags or its data.
            RunFailed: it ended in an error.
            TimeoutError: it is still going on.
        """
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.path} is still going on after {timeout_seconds} s") from None
        except KeyboardInterrupt:
            self.stop()
            raise
        self._raise_if_failed()
        return self

    def __await__(self) -> Generator[Any, None, LaunchedRun]:
        try:
            while self.process.poll() is None:
                yield from asyncio.sleep(0.2).__await__()
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.stop()
            raise
        self._raise_if_failed()
        return self

    def stop(self, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Ask the run to end, as Ctrl-C does; what is left after the grace is killed."""
        if self.process.poll() is not None:
            return
        self._was_stopped = True
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # a session of its own: this reaches its workers too
            self.process.wait()

    def _raise_if_failed(self) -> None:
        code = self.process.returncode
        if code == 0 or self.status == "interrupted":
            return
        lines = self.logs().strip().splitlines() or ["it printed nothing"]
        if code == 2:
            raise UserError(lines[-1].replace("vgglab.train: error: ", ""))
        tail = "\n".join(lines[-NUM_LOG_LINES_SHOWN:])
        raise RunFailed(f"the run in {self.path} ended with exit code {code}\n{tail}")


def obey_leash() -> None:
    """In a launched process: end when the launcher does, however it ends. Call it before the slow imports."""
    if os.environ.pop(LEASH, None) is None:
        return
    # A kernel may have Ctrl-C switched off at the moment it starts us, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_launcher, daemon=True, name="leash").start()


def _end_with_launcher() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(STOP_GRACE_SECONDS)
    os.killpg(os.getpgid(0), signal.SIGKILL)
