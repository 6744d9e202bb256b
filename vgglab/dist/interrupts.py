"""Ctrl-C and termination signals, handled at a safe point."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any, Callable, Iterator, Sequence

STOP_SIGNALS = [  # save and stop: sent by schedulers (the first two), or by a closed terminal
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
]
_received: list[int] = []  # the signals that this process received
_is_stopping = False  # the run is ending: further Ctrl-C is ignored
ends_with_run = False  # set where the process exits after the run: Ctrl-C is then ignored until it does


class StopRequested(BaseException):
    """The run stops because it was asked to. Not an error, so ``except Exception`` must not catch it.

    The message says what was saved and how to resume; it is empty if there was nothing to save.
    """

    def __init__(self, *message: str) -> None:
        super().__init__(*message)
        global _is_stopping
        _is_stopping = True


@contextlib.contextmanager
def deferring_ctrl_c() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block.

    Inside ``torch.save`` it would surface as an error from torch.
    """
    if threading.current_thread() is not threading.main_thread():  # signals do not come here
        yield
        return
    waiting: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        for number in waiting:
            signal.raise_signal(number)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """For a block that starts processes whose initializer is ``leave_signals_to_parent``.

    Ctrl-C during the fork would be lost in one of Python's hooks. The other signals start out blocked in the new
    processes, because one that arrives before the initializer would kill the worker, and with it the run.
    """
    with deferring_ctrl_c():
        if not hasattr(signal, "pthread_sigmask"):
            yield
            return
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """In the block, ``STOP_SIGNALS`` and Ctrl-C are only recorded; the loop checks ``stop_requested`` and stops.

    A second Ctrl-C raises KeyboardInterrupt. A signal that the parent process ignores stays ignored, such as SIGHUP
    under nohup.
    """
    global _is_stopping
    _received.clear()
    _is_stopping = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handling([*STOP_SIGNALS, signal.SIGINT], _note), _unraisable_interrupts():
        yield


@contextlib.contextmanager
def _unraisable_interrupts() -> Iterator[None]:
    """In the block, a KeyboardInterrupt raised in a finalizer is not printed, and the next Ctrl-C raises again.

    Python could only print it. The run still stops after its step.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        global _is_stopping
        if was_interrupted() and issubclass(unraisable.exc_type, KeyboardInterrupt):
            _is_stopping = False
        else:
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


@contextlib.contextmanager
def handling(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """In the block, these signals call ``handler``; a signal that the parent process ignores stays ignored."""
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            is_answered = number == signal.SIGINT and ends_with_run and was_interrupted()
            signal.signal(number, signal.SIG_IGN if is_answered else earlier)


def leave_signals_to_parent(_: int = 0) -> None:
    """In a loader worker: ignore signals meant for the rank, which still needs its batches.

    torchrun signals whole process groups. SIGTERM ends the worker only if its parent sends it, as Python does when it
    exits; if that were ignored too, the two would wait for each other forever.
    """
    for number in {*STOP_SIGNALS, signal.SIGINT} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: it names the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # already so after starting_workers()
        threading.Thread(target=_end_at_parents_word, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_at_parents_word(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _note(number: int, _: Any) -> None:
    global _is_stopping
    if number == signal.SIGINT and was_interrupted():
        if not _is_stopping:  # there it could only disturb how the loader's workers are ended
            _is_stopping = True
            raise KeyboardInterrupt
    elif number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
            os.write(
                2, b"\nCtrl-C: finishing this step, then stopping; press it again to stop at once, without saving\n"
            )
    _received.append(number)


def stop_requested() -> bool:
    """Whether this process was asked to save and stop."""
    return bool(_received)


def was_interrupted() -> bool:
    """Whether Ctrl-C was one of the signals received."""
    return signal.SIGINT in _received


def reason() -> str:
    """What made this process stop, such as ``by SIGTERM``."""
    if was_interrupted():
        return "by Ctrl-C"
    return f"by {signal.Signals(_received[0]).name}" if _received else "with the other ranks"
