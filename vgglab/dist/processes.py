"""The processes of a run on this machine: find them, show what they are doing, kill the remaining ones."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import time
from pathlib import Path
from typing import Any

from vgglab.dist.ranks import MARK, STACK_SIGNAL

KILL_TIMEOUT_SECONDS = 60  # a killed process has ended by then, unless the operating system hangs


def is_alive(pid: int) -> bool:
    """Whether a process with this ID is alive on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is alive, but owned by another user
        pass
    with contextlib.suppress(OSError):  # a zombie has ended; process 1 of a container often does not reap zombies
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def identity(pid: int) -> dict[str, Any]:
    """The identity of a process as recorded in a run directory, so that no other process is mistaken for it.

    ``process`` is the boot ID of the machine and the time from boot to the start of the process, which do not depend
    on the clock; without ``/proc`` it is empty.
    """
    return {"host": socket.gethostname(), "pid": pid, "process": _start_time(pid)}


def is_running(recorded: dict[str, Any]) -> bool:
    """Whether the process with this ``identity`` is alive and on this machine."""
    pid = recorded.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31 or recorded.get("host") != socket.gethostname():
        return False
    return is_alive(pid) and recorded.get("process") == _start_time(pid)


def _start_time(pid: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {ticks}"
    return ""


def find_processes(path: Path) -> list[int]:
    """The IDs of the processes of a run on this machine, found by an environment variable (Linux only)."""
    variable = f"{MARK}={path.resolve()}".encode(errors="surrogateescape")
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and variable in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
    return [pid for pid in pids if pid != os.getpid()]


def request_stack(pid: int, log: Path, seconds: float = 2.0) -> str:
    """The Python stack of a rank's main thread, newest call first; empty if ``pid`` is not the writer of ``log``.

    Works only on Linux and on the machine of the rank. The rank writes the stack to ``log``, where it remains.
    """
    if not (_is_regular_file(log) and _has_open(pid, log) and _handles_stack_signal(pid)):
        return ""
    size, deadline, output = log.stat().st_size, time.monotonic() + seconds, b""
    os.kill(pid, STACK_SIGNAL)
    while time.monotonic() < deadline:
        time.sleep(0.25)  # on a busy machine, a process may write its stack in parts
        previous, output = output, log.read_bytes()[size:]
        if output and output == previous:
            break
    *_, main_thread = re.split(r"^(?:Current thread|Thread) .*\n", output.decode(errors="replace"), flags=re.MULTILINE)
    return main_thread


def _is_regular_file(file: Path) -> bool:
    """Whether this is a regular file with one hard link; a link could lead to the log of another process."""
    with contextlib.suppress(OSError):
        status = file.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    return False


def _handles_stack_signal(pid: int) -> bool:
    """Whether a process handles ``STACK_SIGNAL``, which would kill a process that does not."""
    with contextlib.suppress(OSError, ValueError):
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return caught is not None and bool(int(caught.group(1), 16) >> (STACK_SIGNAL - 1) & 1)
    return False


def _has_open(pid: int, file: Path) -> bool:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if link.samefile(file):
                    return True
    return False


def kill_all(path: Path) -> None:
    """Kill the remaining processes of a run on this machine; wait up to ``KILL_TIMEOUT_SECONDS`` for them to end."""
    deadline = time.monotonic() + KILL_TIMEOUT_SECONDS
    while time.monotonic() < deadline and (remaining := find_processes(path)):
        for pid in remaining:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
