"""Start a run from a notebook or a script, in a separate process that is observed through its run directory.

Training never runs inside the kernel, so a failing cell cannot affect it. Unless detached, a run ends with the
kernel: its processes hold the read end of a pipe and exit when the kernel, which holds the write end, exits. The
environment of each process names the run directory, so that leftover processes can be found.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Generator, Sequence, TypeVar, cast

from vgglab.dist import processes, ranks
from vgglab.errors import RunFailed, UserError
from vgglab.runs.run import ACTIVE, LAUNCH_FILE, Run, is_run_dir, make_run_dir, run_path
from vgglab.runs.seeds import flags_for_seed, is_done, parse_seeds, remove_seeds_flag, seeds_folder
from vgglab.settings.config import Request
from vgglab.settings.parser import parse_flags
from vgglab.storage.files import inode_of, make_folder, nofollow_opener, write_errors
from vgglab.storage.lock import exclusive_access
from vgglab.storage.schema import write_document
from vgglab.view import seeds_board
from vgglab.view.display import NotebookRun, NotebookSeeds

NUM_LOG_LINES_SHOWN = 30
AnyLaunched = TypeVar("AnyLaunched", bound="Launched")
_pipes: set[IO[bytes]] = set()  # the write ends of the pipes to active runs


def _close_pipes() -> None:
    """Close the pipes in a forked child, which could outlive this process and keep its runs alive."""
    for pipe in _pipes:
        pipe.close()


os.register_at_fork(after_in_child=_close_pipes)


def launch(
    flags: str | Sequence[Any] = "",
    watch: bool = True,
    nproc: int | None = None,
    nnodes: int = 1,
    node_rank: int = 0,
    rendezvous: str | None = None,
    max_restarts: int | None = None,
    python: str | None = None,
    detach: bool = False,
    **settings: Any,
) -> LaunchedRun | LaunchedSeeds:
    """Train in new processes and show the progress; the run directory exists when this returns.

    In a live notebook this returns at once and the dashboard keeps updating; elsewhere (papermill, a
    script) it returns when the run has ended.

    Args:
        flags: as on the command line, e.g. ``"--data-path digits --epochs 2"``, or as a list.
        watch: show the run while it is active; if False, this returns at once.
        nproc, max_restarts: same as the flags ``--nproc`` and ``--max-restarts``.
        nnodes, node_rank, rendezvous: for training on several machines: how many there are, the index of this one
            (from 0), and ``host:port`` of the first; torchrun starts the ranks.
        python: the interpreter to train with if not this one, e.g. one that has the card vendor's packages.
        detach: let the run outlive this process; ``vgglab.Run(path)`` can watch and stop it later.
        settings: flags as keywords, e.g. ``data_path="digits", epochs=2``; ``True`` sets a switch, ``None`` is ignored.
            ``seeds=5`` trains five runs in sequence, one per seed.

    Raises:
        UserError: an argument or flag is unknown or out of range; if the call waits, also any UserError of the run.
        RunFailed: the call waited for the run, and the run failed.
    """
    argv = shlex.split(flags) if isinstance(flags, str) else [str(flag) for flag in flags]
    settings.update(nproc=nproc, max_restarts=max_restarts)
    argv += [_as_flag(name, value) for name, value in settings.items() if value is not None]
    config = parse_flags(argv)
    ranks.grace_period_seconds()  # raises for an invalid value, before the run directory is created
    if type(nnodes) is not int or nnodes < 1:
        raise UserError(f"nnodes: {nnodes!r} is not a whole number of at least 1")
    config = replace(config, world_size=config.nproc * nnodes)
    if config.seeds is not None:
        if nnodes > 1 or detach:
            raise UserError(
                "seeds: cannot be combined with nnodes or detach, because this process starts the runs one by one"
            )
        seeds = LaunchedSeeds(seeds_folder(config), parse_seeds(config), remove_seeds_flag(argv), python)
        if watch:
            seeds.watch()
        return seeds
    if nnodes > 1 and (not rendezvous or config.run_dir is None):
        raise UserError("nnodes: with several machines, set rendezvous='<first machine>:<port>' and a shared run_dir")
    path = run_path(config)
    has_launcher = config.world_size > 1 or config.max_restarts > 0
    command = ranks.training_command([*argv, f"--run-dir={path}"], python or sys.executable)
    if nnodes > 1:
        command = [*_torchrun(command[0], config, nnodes, node_rank, rendezvous), *command]
    is_continued = config.resume == "auto" and config.run_dir is not None and is_run_dir(path)
    if node_rank == 0 and not is_continued:
        make_run_dir(path)
    log = path / "log" / ("launcher.txt" if has_launcher else "rank0.txt")
    with write_errors(path):
        make_folder(log.parent)
    with exclusive_access(log.parent):
        if node_rank == 0 and is_run_dir(path) and Run(path).status in ACTIVE:
            raise UserError(f"run_dir {path}: {Run(path).writer()}")
        process = _start(command, argv, path, log, detach)
    run = LaunchedRun(path, process, has_launcher)
    if watch:
        run.watch()
    return run


def _torchrun(python: str, config: Request, nnodes: int, node_rank: int, rendezvous: str | None) -> list[str]:
    """Return the torchrun command to put before the command of a rank, to start it on several machines.

    It does not use the script ``torchrun``, which may not be on the PATH, and uses only flags that torch 1.10 accepts.
    """
    command = [python, "-u", "-c", ranks.TORCHRUN_CODE, f"--nproc_per_node={config.nproc}", "--rdzv_backend=c10d"]
    command += [f"--max_restarts={config.max_restarts}", f"--rdzv_endpoint={rendezvous}", "--rdzv_id=vgglab"]
    # With c10d the machines agree on their order, so node_rank only decides which one creates the run directory.
    return [*command, f"--nnodes={nnodes}", f"--node_rank={node_rank}", "--no_python"]


def _as_flag(name: str, value: Any) -> str:
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def _start(command: list[str], argv: list[str], path: Path, log: Path, detach: bool) -> subprocess.Popen:
    """Start the process of a run and record it in ``launch.json``."""
    environment = {**ranks.with_package_path(os.environ), ranks.MARK: str(path.resolve())}
    if not detach:
        environment[ranks.TIED_TO_LAUNCHER] = "1"
    with write_errors(path):
        log_file = open(log, "ab", opener=nofollow_opener)  # noqa: SIM115
    try:
        with log_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if detach else subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # shields the run from Ctrl-C in the kernel; stop() sends SIGTERM
            )
    except OSError as error:
        raise UserError(f"python: {command[0]!r} cannot be started ({error.strerror})") from None
    if process.stdin is not None:
        _pipes.add(process.stdin)
    try:
        with write_errors(path):
            record = {**processes.identity(process.pid), "inode": inode_of(path)}
            write_document(path / LAUNCH_FILE, {**record, "argv": argv, "command": command})
    except UserError:
        process.kill()
        process.communicate()
        raise
    return process


class Launched:
    """A run or several seeds, started by ``launch``.

    ``await`` it in a cell to wait for its end; unlike ``wait``, this keeps the Stop button working.
    """

    path: Path

    @property
    def is_over(self) -> bool:
        """Whether the run, or the series of seeds, has ended."""
        raise NotImplementedError

    def stop(self) -> Any:
        """Stop the run, or the series of seeds."""
        raise NotImplementedError

    def _raise_if_failed(self) -> None:
        raise NotImplementedError

    def wait(self: AnyLaunched, timeout_seconds: float | None = None) -> AnyLaunched:
        """Wait for the run or series to end, and return ``self``; interrupting the wait stops the run or series.

        Raises:
            UserError: the flags or the data of a run are invalid.
            RunFailed: a run failed.
            TimeoutError: still active after ``timeout_seconds``.
        """
        started = time.monotonic()
        try:
            while not self.is_over:
                if timeout_seconds is not None and time.monotonic() - started > timeout_seconds:
                    raise TimeoutError(f"{self.path} is still running after {timeout_seconds} s")
                time.sleep(0.05)
        except KeyboardInterrupt:
            self.stop()
            raise
        self._raise_if_failed()
        return self

    def __await__(self: AnyLaunched) -> Generator[Any, None, AnyLaunched]:
        try:
            while not self.is_over:
                yield from asyncio.sleep(0.2).__await__()
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.stop()
            raise
        return self.wait()


class LaunchedRun(Launched, NotebookRun):
    """A run started by this process."""

    def __init__(self, path: Path, process: subprocess.Popen, has_launcher: bool = False) -> None:
        super().__init__(path)
        self.process = process
        self.has_launcher = has_launcher  # whether a launcher starts its ranks
        self._was_stopped = False
        self._earlier_ends = self.events("end")  # end events of earlier launches in the same folder

    @property
    def is_over(self) -> bool:
        """Whether the process has ended; if it has, also close the pipe to it."""
        if self.process.poll() is None:
            return False
        if self.process.stdin is not None:
            _pipes.discard(self.process.stdin)
            self.process.stdin.close()
        return True

    @property
    def status(self) -> str:
        is_over = self.is_over  # checked first: the run may end while its events are read
        if is_over and self.events("end") in ([], self._earlier_ends):  # it could not record how it ended
            return "interrupted" if self._was_stopped else "failed"
        status = super().status
        if not is_over and status in ("failed", "interrupted", "done"):
            return "running"  # the launcher is about to restart its ranks, or to end
        return status

    def stop(self, grace_seconds: float | None = None) -> str:
        """Ask the run to save and stop; kill it if it outlasts the grace period. Returns a one-line summary."""
        if self.is_over:
            return f"{self.name}: already ended; status: {self.status}"
        grace_seconds = ranks.grace_period_seconds(grace_seconds)
        self._was_stopped = True
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the run has its own session, so this kills its workers too
            self.process.wait()
        processes.kill_all(self.path)
        return f"{self.name}: process {self.process.pid} was asked to save and stop; status: {self.status}"

    def _raise_if_failed(self) -> None:
        code = self.process.poll()
        if code == 0 or self.status == "interrupted":
            return
        processes.kill_all(self.path)  # in case the launcher itself was killed
        lines = self.logs().strip().splitlines() or [f"{self.path}: its log is empty; is the disk full?"]
        if code == ranks.EXIT_BAD_INPUT and not self.has_launcher:
            raise UserError(lines[-1].replace("vgglab.train: error: ", ""))
        cause = next(iter(self.failures()), None)
        if cause and cause["exit_code"] == ranks.EXIT_BAD_INPUT:
            raise UserError(cause["error"].partition(": ")[2])
        if code == ranks.EXIT_BAD_INPUT:
            errors = [line for line in self.logs("launcher").splitlines() if "error: " in line]
            raise UserError(errors[-1].partition("error: ")[2] if errors else lines[-1])
        if cause and self.has_launcher:
            outcome = "failed" if cause["exit_code"] >= 0 else cause["error"]  # this error says what killed the rank
            raise RunFailed(f"the run in {self.path}: rank {cause['rank']} {outcome}\n{cause['traceback']}".rstrip())
        tail = "\n".join(lines[-NUM_LOG_LINES_SHOWN:])
        raise RunFailed(f"the run in {self.path} ended with exit code {code}\n{tail}")


class LaunchedSeeds(Launched, NotebookSeeds):
    """Runs that differ only in their seed, started by ``launch`` one after the other."""

    def __init__(self, path: Path, seed_values: Sequence[int], argv: Sequence[str], python: str | None) -> None:
        self.path = path.absolute()
        self._runs = {}
        self.seed_values = seed_values
        self.current: LaunchedRun | None = None  # the run that was started last
        self.failure: Exception | None = None
        self._argv, self._python, self._is_stopped = argv, python, False
        self._thread = threading.Thread(target=self._train_seeds, daemon=True, name="vgglab seeds")
        self._thread.start()

    def _train_seeds(self) -> None:
        try:
            for seed in self.seed_values:
                if self._is_stopped:
                    return
                if not is_done(self.path / f"seed-{seed}"):
                    flags = [*self._argv, *flags_for_seed(seed, self.path)]
                    self.current = run = cast(LaunchedRun, launch(flags, watch=False, python=self._python))
                    if self._is_stopped:  # if it is set from here on, stop() finds this run
                        run.stop()
                    run.wait()
        except Exception as error:  # it ends the series, and wait() raises it
            self.failure = error

    @property
    def is_over(self) -> bool:
        """Whether all seeds are done, one has failed, or the series was stopped."""
        return not self._thread.is_alive()

    def _raise_if_failed(self) -> None:
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Stop the active run and do not start another."""
        self._is_stopped = True
        if self.current is not None:
            self.current.stop()
        self._thread.join()

    def watch(self) -> None:
        """Show a live table and return at once; outside a live notebook, wait and show the final table."""
        seeds_board.watch(self)
