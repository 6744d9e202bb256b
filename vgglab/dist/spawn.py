"""Start and supervise the ranks of one machine: ``python -m vgglab.train --nproc 8``.

On one machine this replaces torchrun, whose store listens on every network interface: anyone who can reach the machine
can write data there, which the launcher then unpickles. Here the ranks connect through a file that only its owner can
read, and each rank restricts its collective library to the loopback interface (``Device.open``). (``torch_gcu`` on the
T20 can only connect through ``MASTER_PORT``; which interfaces its store listens on is up to the vendor's library.)

Standard library only: the launcher does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Sequence

from vgglab.dist import ranks
from vgglab.dist.interrupts import handle_signals
from vgglab.dist.signals import STOP_SIGNALS
from vgglab.errors import UserError

POLL_SECONDS = 0.05
FINAL_CODES = (0, ranks.EXIT_BAD_INPUT, ranks.EXIT_STOPPED, ranks.EXIT_INTERRUPTED)  # a restart would not help


def train_on_ranks(argv: Sequence[str], num_ranks: int, max_restarts: int) -> int:
    """Run the training command once per rank; if a rank dies, restart all of them, up to ``max_restarts`` times.

    Termination signals and Ctrl-C are passed on to every rank: after the first Ctrl-C they save and stop, after the
    second they stop at once. They are killed at the third, or when the grace period after the second has passed.
    When a rank fails, the others are asked to stop, and killed after the grace period.

    Returns:
        0, or the exit code of the rank that failed first (1 if it was killed), or 75 or 130 after a signal.

    Raises:
        UserError: the temporary folder for the rendezvous file cannot be created.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="vgglab-")  # mode 0700, random name
    except OSError as error:
        raise UserError(f"TMPDIR: cannot create a folder in {tempfile.gettempdir()} ({error.strerror})") from None
    with folder as path:
        for attempt in range(max_restarts + 1):
            code = _train_once(argv, num_ranks, Path(path), attempt)
            if code in FINAL_CODES or attempt == max_restarts:
                break
            print(f"vgglab.train: restart {attempt + 1} of {max_restarts}", file=sys.stderr)
    return code


def _train_once(argv: Sequence[str], num_ranks: int, folder: Path, attempt: int) -> int:
    """Start all ranks, wait until the last one has ended, and return the exit code of the launcher."""
    environment = _environment(num_ranks, folder, attempt)
    signals: list[int] = []  # received by this process
    failure: int | None = None  # the exit code, once a rank has failed
    with handle_signals([*STOP_SIGNALS, signal.SIGINT], lambda signum, _: signals.append(signum)):
        # Each rank has its own session, so that its workers can be killed too, and a pipe, so it exits with us.
        command = ranks.training_command(argv)
        processes = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            for rank in range(num_ranks)
        ]
        running, deadline, num_sent = dict(enumerate(processes)), float("inf"), 0
        while running:
            time.sleep(POLL_SECONDS)
            while num_sent < len(signals):
                signum = signals[num_sent]
                num_sent += 1
                num_ctrl_c = signals[:num_sent].count(signal.SIGINT)
                _send(signal.SIGKILL if signum == signal.SIGINT and num_ctrl_c > 2 else signum, running.values())
                if num_ctrl_c == 2:
                    deadline = min(deadline, time.monotonic() + ranks.grace_period_seconds())
            ended = [rank for rank, process in running.items() if process.poll() is not None]
            # A killed rank first: the others may have failed because they lost the connection to it.
            for rank in sorted(ended, key=lambda rank: running[rank].returncode >= 0):
                code = running.pop(rank).returncode
                if failure is None and code not in (0, ranks.EXIT_STOPPED, ranks.EXIT_INTERRUPTED):
                    failure = _exit_code_for(rank, code, bool(signals), num_ranks, folder)
                    _send(signal.SIGTERM, running.values())
                    deadline = time.monotonic() + ranks.grace_period_seconds()
            if time.monotonic() > deadline:
                _send(signal.SIGKILL, running.values())
    for process in processes:
        process.stdin.close()  # type: ignore[union-attr]
    if signal.SIGINT in signals:
        return ranks.EXIT_INTERRUPTED
    if failure is not None:
        return failure
    return ranks.EXIT_STOPPED if any(process.returncode for process in processes) else 0


def _exit_code_for(rank: int, code: int, was_signalled: bool, num_ranks: int, folder: Path) -> int:
    """The launcher's exit code for the rank that failed first; records the failure of a rank that was killed."""
    if code >= 0:
        return code
    if was_signalled:  # it was stopped before it had anything to save, or killed after the second Ctrl-C
        return ranks.EXIT_STOPPED
    error = ranks.report_killed(rank, -code, folder)
    print(f"vgglab.train: rank {rank} of {num_ranks}: {error}", file=sys.stderr)
    return 1


def _environment(num_ranks: int, folder: Path, attempt: int) -> dict[str, str]:
    """The environment of all ranks.

    The user's environment can override the number of threads, by default cores divided by ranks.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:  # on a free port
        port = server.getsockname()[1]
    return {
        "OMP_NUM_THREADS": str(max(1, ranks.num_cores() // num_ranks)),
        **ranks.with_package_path(os.environ),
        **{name: str(num_ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),  # torchrun's name for it
        ranks.RENDEZVOUS: str(folder / f"attempt{attempt}"),
        ranks.TIED_TO_LAUNCHER: "1",
    }


def _send(signum: int, processes) -> None:
    """Send a signal to each process; SIGKILL also goes to their workers."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if signum == signal.SIGKILL:
                os.killpg(process.pid, signum)
            else:
                process.send_signal(signum)
