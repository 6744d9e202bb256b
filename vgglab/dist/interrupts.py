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
    """The run ends because it was asked to; not an error, so no ``except Exception`` may hold it.

    Its message says what was saved and how to resume; empty if nothing had to be saved.
    """

    def __init__(self, *message: str) -> None:
        super().__init__(*message)
        global _is_stopping
        _is_stopping = True


@contextlib.contextmanager
def deferring_ctrl_c() -> Iterator[None]:
    """Ctrl-C waits until the block is done, and is answered then.

    Inside ``torch.save`` it would come out as an error of torch's own.
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
    """In the block processes can be started that have ``leave_signals_to_parent`` as their initializer.

    Ctrl-C during the fork would be lost in one of Python's hooks. The other signals are blocked in the new processes
    from the start: one that arrives before the initializer has run would end the worker, and with it the run.
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
    """In the block ``STOP_SIGNALS`` and Ctrl-C are only recorded; the loop checks ``stop_requested`` and stops.

    A second Ctrl-C is a KeyboardInterrupt. A signal that was switched off from outside stays so: under nohup a closed
    terminal is nothing.
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
    """In the block a KeyboardInterrupt that was raised in a finalizer is not printed, and the next Ctrl-C raises again.

    Python can only print it. The run still stops after its step.
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
    """In the block these signals call ``handler``; one that was switched off from outside stays so."""
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            is_answered = number == signal.SIGINT and ends_with_run and was_interrupted()
            signal.signal(number, signal.SIG_IGN if is_answered else earlier)


def leave_signals_to_parent(_: int = 0) -> None:
    """In a loader's worker: torchrun warns whole process groups, and the rank still needs its batches.

    SIGTERM ends the worker only where its parent sends it, as Python does on its way out; ignored from there too, the
    two would wait for one another for ever.
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
    """Whether Ctrl-C was among the signals."""
    return signal.SIGINT in _received


def reason() -> str:
    """Why this process stops, such as ``by SIGTERM``."""
    if was_interrupted():
        return "by Ctrl-C"
    return f"by {signal.Signals(_received[0]).name}" if _received else "with the other ranks"
