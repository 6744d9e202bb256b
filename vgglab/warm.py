"""A process that has imported torch, and forks a child for each run of a series.

Importing torch takes longer than everything else in a short run; a series of five seeds need not pay for it five times.
A child is what ``launch`` would have started: a session of its own, its output in the run's log, and a leash, so that
it ends with whoever started it. It trains nothing else, so a seed gives here what it gives alone, bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Sequence

from vgglab import ranks

LOOK_EVERY_SECONDS = 0.05


class ForkedProcess:
    """A child, with what ``subprocess.Popen`` offers of it."""

    stdin = None  # its leash is held by the process that has forked it

    def __init__(self, warm: Warm, pid: int) -> None:
        self.pid, self.returncode = pid, None  # type: int, int | None
        self._warm, self._lock = warm, threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and self._warm.has_answer():
                answer = self._warm.answer()
                self.returncode = int(answer) if answer else -signal.SIGKILL  # its parent is gone, and it with that
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            code = self.poll()
            if code is not None:
                return code
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(LOOK_EVERY_SECONDS)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Warm:
    """Forks one child after the other; ``close`` it after the last."""

    def __init__(self, device: str, environment: dict[str, str]) -> None:
        """``device``: as the flag has it."""
        command = [sys.executable, "-u", "-m", "vgglab.warm", device]
        # Threads of numpy's, which no training uses, would not survive the fork.
        environment = {**environment, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where it fails, the run is started in another way and says why
            env=environment,
            start_new_session=True,  # the kernel's Ctrl-C is not meant for it
        )
        assert self._process.stdin is not None
        os.register_at_fork(after_in_child=self._process.stdin.close)  # what this process forks may outlive it

    def start(self, argv: Sequence[str], log: Path, environment: dict[str, str]) -> ForkedProcess | None:
        """Train with these flags; None where it cannot, for whatever reason: start the run in another way then."""
        request = {"argv": list(argv), "log": str(log.absolute()), "cwd": os.getcwd(), "environment": environment}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = self.answer()
            if answer:
                return ForkedProcess(self, int(answer))
        return None

    def has_answer(self) -> bool:
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout.fileno()], [], [], 0)[0])

    def answer(self) -> bytes:
        """The next line, of fewer bytes than a pipe passes on at once; empty where the process has ended."""
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._process.stdout.fileno(), 1)
            if not byte:
                return b""
            line += byte
        return line

    def close(self) -> None:
        """A child that still trains is asked to save and leave."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def serve(device: str) -> list[str] | None:
    """Fork for each request. Returns in each child, with the flags it is to train with, and at the end with None."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever somebody prints is no answer
    from vgglab.devices import before_torch

    before_torch(device)
    import torch  # noqa: F401

    while True:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(0, 1)
            if not byte:
                return None
            line += byte
        request = json.loads(line)
        leash, held = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            os.close(held)
            _become(request, leash)
            return request["argv"]
        os.close(leash)
        os.write(answers, b"%d\n" % pid)
        os.write(answers, b"%d\n" % _wait(pid, held))


def _become(request: dict, leash: int) -> None:
    """Have this child look as if it had been started by itself."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for source, target in (leash, 0), (log, 1), (log, 2):
        os.dup2(source, target)
    os.close(leash)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = [str(Path(__file__).with_name("train.py")), *request["argv"]]
    ranks.STARTED = time.monotonic()


def _wait(pid: int, held: int) -> int:
    """The child's exit code, negative for a signal. Where the launcher is gone, the child's leash is let go."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(OSError):
                os.close(held)
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if held >= 0 and select.select([0], [], [], LOOK_EVERY_SECONDS)[0]:
            os.close(held)
            held = -1
        elif held < 0:
            time.sleep(LOOK_EVERY_SECONDS)


if __name__ == "__main__":
    argv = serve(sys.argv[1])
    if argv is None:
        sys.exit()
    from vgglab.train import main

    try:
        code = main(argv)
    except Exception:  # as at the end of vgglab/train.py
        traceback.print_exc()
        code = 1
    gc.collect()
    ranks.leave(code)
