"""The rank of this process: how it was launched, how it ends with its launcher, and how its failure is recorded.

Standard library only and quick to import, so that a rank notices the death of its launcher even before it has imported
torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Mapping, NoReturn, Sequence

from vgglab.errors import UserError
from vgglab.storage.files import read_bytes
from vgglab.storage.schema import FAILURE, parse_line, write_document

TIED_TO_LAUNCHER = "VGGLAB_TIED_TO_LAUNCHER"  # set for a launched process, which ends when the pipe at its stdin closes
MARK = "VGGLAB_RUN"  # set for a launched process and its descendants: their run directory
STACK_SIGNAL = signal.SIGUSR2  # makes a rank write its stack to its log
RENDEZVOUS = "VGGLAB_RENDEZVOUS"  # set for ranks that dist/spawn.py starts: the file they use to connect
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # sysexits.h: a temporary failure, try again
EXIT_INTERRUPTED = 130  # shell convention: 128 + SIGINT
PARENT_POLL_SECONDS = 0.5
CRASH_HEADER = "Fatal Python error: "  # what faulthandler prints first after one of these signals
CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGILL, signal.SIGBUS)
RUN_PATH_FILE = "vgglab_run"  # file in the folder of a launch that contains the path of the run directory

# Not ``-m``, which imports from the current folder first: another user may have put modules there.
WITHOUT_CWD = "import sys; sys.path[:] = filter(None, sys.path); "
TRAIN_CODE = WITHOUT_CWD + "sys.argv[0] = 'vgglab.train'; from vgglab.train import run_and_exit; run_and_exit()"
TORCHRUN_CODE = WITHOUT_CWD + "from torch.distributed.run import main; main()"

# In the messages of errors that mean a lost connection; a device adds the name of its collective library.
LOST_PEER_PHRASES = {"closed by peer", "reset by peer", "connection refused", "broken pipe", "socket", "gloo"}

PROCESS_STARTED = time.monotonic()  # when this process began; this module is among the first to be imported
_kept_alive: tuple[Any, ...] = ()  # objects that must never be destroyed
run_dir: Path | None = None  # the run directory of this process, set by set_run_dir


def grace_period_seconds(chosen: float | None = None) -> float:
    """Seconds given to a run to save and stop before it is killed. Raises UserError for an invalid setting."""
    if chosen is not None:
        return chosen
    value = os.environ.get("VGGLAB_GRACE_SECONDS", "10")  # a slow disk, or a busy machine, may need longer
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]+)?", value):
        raise UserError(f"VGGLAB_GRACE_SECONDS: {value!r} is not a number of seconds from 0 to 99999, such as 10")
    return float(value)


def training_command(argv: Sequence[str], python: str = sys.executable) -> list[str]:
    """The command line of a new training process; run it in the environment from ``with_package_path``."""
    return [python, "-u", "-c", TRAIN_CODE, *argv]


def with_package_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with this package added to ``PYTHONPATH`` if it is not installed."""
    folder = Path(__file__).resolve().parent.parent.parent
    if folder.name in ("site-packages", "dist-packages"):
        return dict(environment)
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(folder)]))}


def tie_to_launcher() -> None:
    """Tie this process to its launcher: it ends when the launcher does. Call this before slow imports."""
    open_closed_streams()
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)  # prints a stack if a vendor's library crashes
    grace_period_seconds()  # reject an invalid setting now, not when it is needed
    if os.environ.pop(TIED_TO_LAUNCHER, None) is not None:
        # A Jupyter kernel may be ignoring Ctrl-C when it starts this process, which inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_exit_with_launcher, daemon=True, name="launcher").start()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # If torchrun is killed, its ranks keep training, because each has its own session.
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True, name="guard").start()


def open_closed_streams() -> None:
    """Open missing standard streams, because after ``2>&-`` the next file opened would get file descriptor 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _exit_with_launcher() -> None:
    while os.read(0, 1024):
        pass
    _stop_and_exit()


def _exit_with_parent(parent: int) -> None:
    if _is_torchrun(parent):
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
    _stop_and_exit()


def _is_torchrun(pid: int) -> bool:
    """Whether process ``pid`` is still our launcher, not a process that adopts orphans (init, systemd --user, tini).

    In a container torchrun itself can be process 1.
    """
    folder = Path(f"/proc/{pid}")
    try:
        if MARK in os.environ:  # a torchrun started by vgglab.launch has the same value
            return f"{MARK}={os.environ[MARK]}".encode() in (folder / "environ").read_bytes().split(b"\0")
        is_python = "python" in (folder / "exe").resolve().name
        return is_python and (pid != 1 or b"torch" in (folder / "cmdline").read_bytes())
    except OSError:  # no /proc, or another user's process
        return pid != 1


def _stop_and_exit() -> None:
    """Ask this process to save and stop; kill it and its workers after the grace period."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_period_seconds())
    with contextlib.suppress(OSError):
        os.killpg(os.getpgid(0), signal.SIGKILL)


def skip_cleanup_at_exit(keep: Any) -> None:
    """Make ``exit_process`` skip Python's shutdown and the destructor of ``keep``; ``devices/base.py`` says why."""
    global _kept_alive
    _kept_alive = (keep,)


def exit_process(code: int) -> NoReturn:
    """End this process, after flushing its output."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk: Python would try again and change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if not _kept_alive:
        sys.exit(code)
    os._exit(code)


def print_line(line: str) -> None:
    """Print a line to stderr; ignore errors."""
    with contextlib.suppress(OSError):
        print(f"vgglab.train: {line}", file=sys.stderr)


def num_cores() -> int:
    """The number of cores that this process may use; in a container or under Slurm, often not all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_restarts() -> int:
    """How many times the launcher has restarted the ranks of this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _launch_folder() -> Path | None:
    """A private folder of this launch, shared by all its attempts; None without a launcher."""
    if RENDEZVOUS in os.environ:
        return Path(os.environ[RENDEZVOUS]).parent
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun's: <folder>/attempt_<n>/<rank>/error.json
    return Path(error_file).parents[2] if error_file else None


def recorded_run_dir(folder: Path) -> Path | None:
    """The run directory recorded in ``folder``, the private folder of a launch; None if there is none yet."""
    file = folder / RUN_PATH_FILE
    return Path(file.read_text(encoding="utf-8")) if file.exists() else None


def previous_run_dir() -> Path | None:
    """The run directory used before a restart; None in the first attempt.

    Raises:
        UserError: there are several machines, and ``--run-dir`` was not given.
    """
    if num_restarts() == 0:
        return None
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise UserError("--max-restarts on several machines needs a --run-dir on a shared file system")
    folder = _launch_folder()
    return recorded_run_dir(folder) if folder else None


def set_run_dir(path: Path) -> None:
    """Set the run directory, in which a failure of this rank is recorded.

    Rank 0 also records it in the folder of the launch, so that a restart can find it.
    """
    global run_dir
    run_dir = path
    folder = _launch_folder()
    if folder is not None and folder.is_dir() and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            (folder / RUN_PATH_FILE).write_text(str(path.absolute()), encoding="utf-8")


def resume_advice(path: Path) -> str:
    """A phrase with the flags that continue the run in this directory, whether or not it has a checkpoint."""
    return f"continue with --run-dir {path} --resume auto"


def prefix() -> str:
    """The prefix of messages from this process, such as ``rank 1 of 8: ``; empty for a single process."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return f"rank {os.environ.get('RANK', 0)} of {world_size}: " if world_size > 1 else ""


def report_failure(error: BaseException, exit_code: int) -> None:
    """Record why this rank failed, in the run directory and where torchrun looks for it.

    ``log/failure-rank<r>.json`` contains the rank, host and time, the error in one line, the traceback and the exit
    code. If several ranks write such a file, ``failures`` puts the root cause first.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    launch_dir = os.environ.get(MARK)  # its log folder is created before any rank starts
    path = run_dir or (Path(launch_dir) if launch_dir else None)
    if path and not run_dir and exit_code == EXIT_BAD_INPUT and os.path.exists(path / "events.jsonl"):
        path = None  # bad input is not a failure of the run that already exists
    line, rank = f"{type(error).__name__}: {error}", int(os.environ.get("RANK", 0))
    _write_failure(path, rank, line, exit_code, text, has_lost_peers(error))
    if prefix() and os.environ.get("TORCHELASTIC_ERROR_FILE") and "torch" in sys.modules:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(Exception):  # torchrun's summary is optional
            get_error_handler().record_exception(error)


def report_killed(rank: int, signum: int, folder: Path) -> str:
    """Record, on behalf of the launcher, the failure of a rank that was killed by a signal; return the error message.

    Args:
        folder: the folder of the launch, as in ``recorded_run_dir``.
    """
    signal_name = signal.Signals(signum).name if signum in list(signal.Signals) else f"signal {signum}"
    line = f"was killed ({signal_name})"
    if signum == signal.SIGKILL:
        line += "; if you did not kill it yourself, the machine probably ran out of memory"
    launch_dir = os.environ.get(MARK)
    path = recorded_run_dir(folder) or (Path(launch_dir) if launch_dir else None)
    log = path / "log" / f"rank{rank}.txt" if path else None
    stack = ""
    if signum in CRASH_SIGNALS and log and log.exists():
        _, header, after = log.read_text(encoding="utf-8", errors="replace").rpartition(CRASH_HEADER)
        stack = header + after if header else ""
    _write_failure(path, rank, line, -signum, stack)
    return line


def _write_failure(
    path: Path | None, rank: int, error: str, exit_code: int, text: str = "", has_lost_peers: bool = False
) -> None:
    if path is None or not (path / "log").is_dir():
        return
    failure = {
        "rank": rank, "time": time.time(), "host": socket.gethostname(), "error": error, "traceback": text,
        "exit_code": exit_code, "has_lost_peers": has_lost_peers,
    }  # fmt: skip
    with contextlib.suppress(OSError):
        write_document(path / "log" / f"failure-rank{rank}.json", failure)


def has_lost_peers(error: BaseException) -> bool:
    """Whether an error means that the connection to another rank was lost."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in LOST_PEER_PHRASES)


def failures(path: Path) -> list[dict[str, Any]]:
    """The failures of a run's ranks, root cause first; ranks that only lost a connection come last."""
    records = []
    for file in sorted((path / "log").glob("failure-rank*.json")):
        with contextlib.suppress(UserError):
            records.append(parse_line(read_bytes(file) or b"", FAILURE))
    return sorted(filter(None, records), key=lambda failure: (failure["has_lost_peers"], failure["time"]))


def delete_failures(path: Path) -> None:
    """Delete the failure records of a run that is being continued."""
    for file in (path / "log").glob("failure-rank*.json"):
        with contextlib.suppress(OSError):  # it is a folder
            file.unlink()
