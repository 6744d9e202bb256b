"""Requests to stop a run, by Ctrl-C or a termination signal; they are handled at a safe point."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any, Callable, Iterator, Sequence

from vgglab.dist.signals import STOP_SIGNALS

_received: list[int] = []  # the signals that this process received
_is_stopping = False  # the run is ending; further Ctrl-C presses are ignored
exits_with_run = False  # True if the process exits with the run; an interrupted run then ignores Ctrl-C until exit


class StopRequested(BaseException):
    """Raised to stop a run on request. It is not an error, so ``except Exception`` must not catch it.

    The message says what was saved and how to resume; it is empty if there was nothing to save.
    """

    def __init__(self, *message: str) -> None:
        super().__init__(*message)
        global _is_stopping
        _is_stopping = True


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """In the block, ``STOP_SIGNALS`` and Ctrl-C are only recorded; the training loop checks ``stop_requested``.

    A second Ctrl-C raises KeyboardInterrupt. A signal that the parent process ignores, such as SIGHUP under nohup,
    stays ignored.
    """
    global _is_stopping
    _received.clear()
    _is_stopping = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handle_signals([*STOP_SIGNALS, signal.SIGINT], _record_signal), _silence_unraisable_interrupts():
        yield


@contextlib.contextmanager
def _silence_unraisable_interrupts() -> Iterator[None]:
    """In the block, do not print a KeyboardInterrupt raised in a finalizer, which Python cannot propagate.

    The next Ctrl-C raises KeyboardInterrupt again; without one, the run still stops after the current step.
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
def handle_signals(signums: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """In the block, these signals call ``handler``; a signal that the parent process ignores stays ignored."""
    handled = [signum for signum in signums if signal.getsignal(signum) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, handler) for signum in handled}
    try:
        yield
    finally:
        for signum, original in previous.items():
            is_ignored = signum == signal.SIGINT and exits_with_run and was_interrupted()
            signal.signal(signum, signal.SIG_IGN if is_ignored else original)


def _record_signal(signum: int, _: Any) -> None:
    global _is_stopping
    if signum == signal.SIGINT and was_interrupted():
        if not _is_stopping:  # while stopping, it would only disturb the shutdown of the workers
            _is_stopping = True
            raise KeyboardInterrupt
    elif signum == signal.SIGINT and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # not print(): the signal may have interrupted one, and it is not reentrant
            os.write(
                2, b"\nCtrl-C: finishing this step, then stopping; press it again to stop at once, without saving\n"
            )
    _received.append(signum)


def stop_requested() -> bool:
    """Whether this process was asked to save and stop."""
    return bool(_received)


def was_interrupted() -> bool:
    """Whether Ctrl-C was one of the signals received."""
    return signal.SIGINT in _received


def reason() -> str:
    """The cause of the stop, as a phrase such as ``by SIGTERM``."""
    if was_interrupted():
        return "by Ctrl-C"
    return f"by {signal.Signals(_received[0]).name}" if _received else "with the other ranks"
