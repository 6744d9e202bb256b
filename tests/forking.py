"""``subprocess.Popen`` that forks training processes and kernels from a process that has imported torch.

``processes.python`` saves the start of an interpreter for the process that a test itself starts. With the environment
variable ``FORKED`` set to 1, this also applies to the processes that it starts in turn: the kernel of a notebook, the
run that a cell launches, its ranks. Each of these processes forks a helper before it imports anything else. For each
call of ``Popen`` the helper forks twice, and the process in between exits. The new process is then adopted by the
caller of ``Popen``, which has declared itself a subreaper and can wait for it like for any child.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Callable, Mapping

FORKED = "VGGLAB_TESTS_FORKED"
PADDING = "VGGLAB_TESTS_PADDING"  # variable of the server: makes room for the environment of its children
PR_SET_CHILD_SUBREAPER = 36
MAX_REQUEST_BYTES = 1 << 18


def show_environment(environment: Mapping[str, str]) -> None:
    """Overwrite the memory that ``/proc/<pid>/environ`` shows, which was the environment of the server."""
    with contextlib.suppress(OSError):  # no /proc
        start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
        content = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
        assert len(content) <= end - start, f"{PADDING} is too short"
        ctypes.memmove(start, content.ljust(end - start, b"\0"), end - start)


def fork_children(run: Callable[..., int], start_helper: Callable[..., Any] | None = None) -> Callable[[], None]:
    """From now on, fork the processes that this one starts with ``FORKED=1`` in their environment.

    Args:
        run: called in a new process with the ``args``, ``env`` and ``cwd`` of ``Popen``; returns the exit code.
        start_helper: starts a process that calls ``serve`` with the arguments passed to this function; needed if this
            process cannot be forked itself.

    Returns:
        A function that ends this.
    """
    if sys.platform != "linux" or not hasattr(socket, "send_fds"):  # or Python 3.8: processes start as usual
        return lambda: None
    adopt = functools.partial(ctypes.CDLL(None).prctl, PR_SET_CHILD_SUBREAPER)
    adopt(1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if start_helper is not None:
        start_helper(theirs, run)
    elif os.fork() == 0:
        ours.close()
        serve(theirs, run)
    theirs.close()
    original = subprocess.Popen._execute_child
    parameters = list(inspect.signature(original).parameters)
    lock = threading.Lock()

    @functools.wraps(original)
    def execute_child(popen, *values):
        options = dict(zip(parameters[1:], values))
        if not _is_forkable(options):
            return original(popen, *values)
        streams = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [number if fd == -1 else fd for number, fd in enumerate(streams)]
        request = {name: options[name] for name in ("args", "env", "start_new_session")}
        request["cwd"] = os.path.abspath(options["cwd"] or ".")
        with lock:
            socket.send_fds(ours, [json.dumps(request).encode()], streams)
            popen.pid = int(ours.recv(64))
        popen._child_created = True
        popen._close_pipe_fds(
            *(options[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )

    def end():
        subprocess.Popen._execute_child = original
        ours.close()
        adopt(0)

    subprocess.Popen._execute_child = execute_child
    return end


def _is_forkable(options: dict[str, Any]) -> bool:
    args, environment = options["args"], options["env"]
    if not isinstance(args, list) or options["shell"] or options["preexec_fn"] or options["pass_fds"]:
        return False
    is_python = args[0] == sys.executable and args[1:2] in (["-u"], ["-m"])
    return is_python and environment is not None and environment.get(FORKED) == "1"


def serve(requests: socket.socket, run: Callable[..., int]) -> None:
    """Fork a process for each request; exit when the process at the other end of the socket closes it, or ends."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # meant for the others in its process group
    show_environment({})  # tests that look for the processes of a run do not find this one
    while True:
        message, streams, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 3)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork() == 0:
                while os.getppid() == between:  # until the adoption
                    os.sched_yield()
                _become(json.loads(message), streams, run, requests)
            os._exit(0)
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)


def _become(request: dict[str, Any], streams: list[int], run: Callable[..., int], requests: socket.socket) -> None:
    code = 1
    try:
        if request.pop("start_new_session"):
            os.setsid()
        requests.send(str(os.getpid()).encode())
        requests.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for stream in streams:
            os.close(stream)
        code = run(**request)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
