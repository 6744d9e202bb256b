"""This rank: who launched it, when to end together with the launcher, and what to record if it fails.

Standard library only and quick to import, because a rank must notice if its launcher dies before torch is imported.
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
from vgglab.storage.files import exists, read_bytes
from vgglab.storage.schema import FAILURE, line_in, write_document

TIED_TO_LAUNCHER = "VGGLAB_TIED_TO_LAUNCHER"  # set for a launched process: it ends when the pipe at its stdin does
MARK = "VGGLAB_RUN"  # set for a launched process and all below it: the run directory they work for
STACK_SIGNAL = signal.SIGUSR2  # a rank answers by writing its stack into its log
RENDEZVOUS = "VGGLAB_RENDEZVOUS"  # set for the ranks that dist/spawn.py starts: the file in which they find each other
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # sysexits.h: a temporary failure, try again
EXIT_INTERRUPTED = 130  # as a shell has it: 128 + SIGINT
GUARD_SECONDS = 0.5
FATAL = "Fatal Python error: "  # as faulthandler begins a stack, at one of these signals
FAULTS = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGILL, signal.SIGBUS)
RUN_NOTE = "vgglab_run"  # in the folder of a launch: the run directory that its ranks work in

COLLECTIVES = ("gloo", "nccl", "eccl")  # the libraries that sum over the ranks, by the name of torch's backend
# Not ``-m``: that would import from the current folder first, which may be somebody else's.
WITHOUT_CWD = "import sys; sys.path[:] = filter(None, sys.path); "
TRAIN = WITHOUT_CWD + "sys.argv[0] = 'vgglab.train'; from vgglab.train import run_and_exit; run_and_exit()"
TORCHRUN = WITHOUT_CWD + "from torch.distributed.run import main; main()"

LOST_PEERS = ("closed by peer", "reset by peer", "connection refused", "broken pipe", "socket", *COLLECTIVES)

STARTED = time.monotonic()  # when this process began; this module is among the first to be imported
_kept: tuple[Any, ...] = ()  # never to be taken apart
_run_dir: Path | None = None  # where this process's failure is written down


def grace_period_seconds(chosen: float | None = None) -> float:
    """Seconds between asking a run to save and stop, and killing it. Raises UserError for an invalid setting."""
    if chosen is not None:
        return chosen
    given = os.environ.get("VGGLAB_GRACE_SECONDS", "10")  # a slow disk, or a busy machine, may need longer
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]+)?", given):
        raise UserError(f"VGGLAB_GRACE_SECONDS: {given!r} is not a number of seconds from 0 to 99999, such as 10")
    return float(given)


def training_command(argv: Sequence[str], python: str = sys.executable) -> list[str]:
    """The command line of a new training process; ``with_package`` gives its environment."""
    return [python, "-u", "-c", TRAIN, *argv]


def with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with this package added to ``PYTHONPATH`` if it is not installed."""
    home = Path(__file__).resolve().parent.parent.parent
    if home.name in ("site-packages", "dist-packages"):
        return dict(environment)
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(home)]))}


def tie_to_launcher() -> None:
    """Tie this process to its launcher: it ends when the launcher does. Call this before slow imports."""
    open_closed_streams()
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)  # a stack, where a vendor's library breaks off
    grace_period_seconds()  # refused now, not when it is needed
    if os.environ.pop(TIED_TO_LAUNCHER, None) is not None:
        # A kernel may have Ctrl-C switched off at the moment it starts us, and that is inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_end_with_launcher, daemon=True, name="launcher").start()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A torchrun that is killed leaves its ranks training, because each has its own session.
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True, name="guard").start()


def open_closed_streams() -> None:
    """Open missing standard streams: after ``2>&-`` the next file opened would become file descriptor 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _end_with_launcher() -> None:
    while os.read(0, 1024):
        pass
    _end()


def _end_with_parent(parent: int) -> None:
    if _is_torchrun(parent):
        while os.getppid() == parent:
            time.sleep(GUARD_SECONDS)
    _end()


def _is_torchrun(pid: int) -> bool:
    """Whether this process is still our launcher, not one that adopts orphans: init, systemd --user, tini.

    In a container torchrun itself can be process 1.
    """
    folder = Path(f"/proc/{pid}")
    try:
        if MARK in os.environ:  # the torchrun that vgglab.launch has started carries the same one
            return f"{MARK}={os.environ[MARK]}".encode() in (folder / "environ").read_bytes().split(b"\0")
        is_python = "python" in (folder / "exe").resolve().name
        return is_python and (pid != 1 or b"torch" in (folder / "cmdline").read_bytes())
    except OSError:  # no /proc, or somebody else's process
        return pid != 1


def _end() -> None:
    """Ask this process to save and stop; kill it and its workers after the grace period."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_period_seconds())
    with contextlib.suppress(OSError):
        os.killpg(os.getpgid(0), signal.SIGKILL)


def skip_cleanup_at_exit(keep: Any) -> None:
    """Have ``exit_process`` skip Python's shutdown and the destructor of ``keep`` (why: ``devices/stock.py``)."""
    global _kept
    _kept = (keep,)


def exit_process(code: int) -> NoReturn:
    """End this process, after flushing its output."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk: Python would try again and change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if not _kept:
        sys.exit(code)
    os._exit(code)


def say(line: str) -> None:
    """Print on stderr, if possible."""
    with contextlib.suppress(OSError):
        print(f"vgglab.train: {line}", file=sys.stderr)


def num_cores() -> int:
    """The number of cores that this process may use; in a container or under Slurm not all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_restarts() -> int:
    """How often the launcher has restarted the ranks of this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _launch_folder() -> Path | None:
    """A private folder shared by all attempts of this launch, and by no other launch."""
    if RENDEZVOUS in os.environ:
        return Path(os.environ[RENDEZVOUS]).parent
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun's: <folder>/attempt_<n>/<rank>/error.json
    return Path(error_file).parents[2] if error_file else None


def remember_run(path: Path) -> None:
    """Record the run directory for a restart."""
    folder = _launch_folder()
    if folder is not None and folder.is_dir():
        with contextlib.suppress(OSError):
            (folder / RUN_NOTE).write_text(str(path.absolute()), encoding="utf-8")


def remembered_run(folder: Path) -> Path | None:
    """The run directory of this launch, or of the attempt before a restart; None if there is none yet."""
    note = folder / RUN_NOTE
    return Path(note.read_text(encoding="utf-8")) if note.exists() else None


def run_of_earlier_attempt() -> Path | None:
    """The run directory used before a restart; None in a first attempt.

    Raises:
        UserError: there are several machines, and ``--run-dir`` was not given.
    """
    if num_restarts() == 0:
        return None
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise UserError("--max-restarts on several machines needs a --run-dir that all of them can see")
    folder = _launch_folder()
    return remembered_run(folder) if folder else None


def set_run_dir(path: Path) -> None:
    """Set the run directory in which a failure of this rank is recorded."""
    global _run_dir
    _run_dir = path


def run_dir() -> Path | None:
    """The run directory of this process; None before there is one."""
    return _run_dir


def resume_advice(path: Path) -> str:
    """The flags that continue a run in this directory, whether or not it has a checkpoint."""
    return f"continue with --run-dir {path} --resume auto"


def name() -> str:
    """The prefix of messages from this process, ``rank 1 of 8: ``; empty for a single process."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return f"rank {os.environ.get('RANK', 0)} of {world_size}: " if world_size > 1 else ""


def report_failure(error: BaseException, exit_code: int) -> None:
    """Record why this rank failed, in the run directory and where torchrun looks for it.

    ``log/failure-rank<r>.json``: rank, time, error in one line, traceback, exit code. If several ranks leave such a
    file, the earliest is the root cause.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    launched_for = os.environ.get(MARK)  # its log folder is there before any rank is
    path = _run_dir or (Path(launched_for) if launched_for else None)
    if path and not _run_dir and exit_code == EXIT_BAD_INPUT and exists(path / "events.jsonl"):
        path = None  # what is refused is no failure of the run that is there
    line, rank = f"{type(error).__name__}: {error}", int(os.environ.get("RANK", 0))
    _write_failure(path, rank, line, exit_code, text, has_lost_peers(error))
    if name() and os.environ.get("TORCHELASTIC_ERROR_FILE") and "torch" in sys.modules:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(Exception):  # its summary is a courtesy
            get_error_handler().record_exception(error)


def report_killed(rank: int, number: int, folder: Path) -> str:
    """Record the failure of a rank that was killed by a signal, on behalf of its launcher; return the record.

    Args:
        folder: of the launch, as in ``remembered_run``.
    """
    signal_name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    hint = "; if nobody killed it, the machine ran out of memory" if number == signal.SIGKILL else ""
    line = f"was killed ({signal_name}){hint}"
    launched_for = os.environ.get(MARK)
    path = remembered_run(folder) or (Path(launched_for) if launched_for else None)
    log = path / "log" / f"rank{rank}.txt" if path else None
    stack = ""
    if number in FAULTS and log and log.exists():
        _, found, after = log.read_text(encoding="utf-8", errors="replace").rpartition(FATAL)
        stack = found + after if found else ""
    _write_failure(path, rank, line, -number, stack)
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
    return isinstance(error, RuntimeError) and any(words in text for words in LOST_PEERS)


def failures(path: Path) -> list[dict[str, Any]]:
    """The failures of a run's ranks, root cause first; ranks that only lost a connection come last."""
    found = []
    for file in sorted((path / "log").glob("failure-rank*.json")):
        with contextlib.suppress(UserError):
            found.append(line_in(read_bytes(file) or b"", FAILURE))
    return sorted(filter(None, found), key=lambda failure: (failure["has_lost_peers"], failure["time"]))


def forget_failures(path: Path) -> None:
    """Delete the records of failures, when a run continues."""
    for file in (path / "log").glob("failure-rank*.json"):
        with contextlib.suppress(OSError):  # a folder of that name
            file.unlink()
