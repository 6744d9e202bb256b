"""Signals that are deferred while this process saves or starts workers, and those that loader workers ignore."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Iterator

# Mean save and stop; sent by schedulers (the first two) or when a terminal closes.
STOP_SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@contextlib.contextmanager
def defer_ctrl_c() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block.

    Inside ``torch.save``, a KeyboardInterrupt would surface as an error from torch.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    deferred: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda signum, _: deferred.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        for signum in deferred:
            signal.raise_signal(signum)


@contextlib.contextmanager
def block_signals_during_start() -> Iterator[None]:
    """Defer Ctrl-C in a block that starts processes with the initializer ``ignore_signals_in_worker``.

    Ctrl-C during the fork would be lost in one of Python's at-fork hooks. ``STOP_SIGNALS`` are blocked, because
    one that arrives before the initializer has run would kill the worker, and the run with it.
    """
    with defer_ctrl_c():
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def ignore_signals_in_worker(_: int = 0) -> None:
    """Make a loader worker ignore signals that are meant for the rank, which still needs the worker's batches.

    torchrun signals whole process groups. On Linux, a SIGTERM from the parent still ends the worker: Python sends one
    at exit, and if the worker ignored it, both would wait for each other forever.
    """
    for signum in {*STOP_SIGNALS, signal.SIGINT} - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux only; it reports the sender of the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # already blocked after block_signals_during_start()
        threading.Thread(target=_exit_when_parent_signals, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _exit_when_parent_signals(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
