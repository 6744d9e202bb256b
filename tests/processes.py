"""Cheap processes for tests that do not depend on how a process starts: forked from a server that has imported torch.

``python("-m", "vgglab.train", ...)`` returns the same as ``shell("python", "-m", "vgglab.train", ...)``, without the
seconds that each new interpreter spends on ``import torch``. The server (Python's forkserver, one per pytest process,
started on first use) has imported torch and a few other packages, but no module of vgglab: each child imports the
package from its ``PYTHONPATH``.

Forked processes cannot test the following, which needs ``shell``: interpreter startup, the order of imports, variables
that torch or the C library reads at startup, the command line as ``/proc`` shows it, and Python's shutdown.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import lru_cache
from multiprocessing import connection, forkserver
from pathlib import Path
from types import ModuleType
from typing import Mapping

from forking import FORKED, PADDING, fork_children, serve, show_environment

PROJECT = Path(__file__).resolve().parent.parent
# A timeout that only a hang exceeds; no test requires a fast machine.
MAX_WAIT_SECONDS = 600
GRACE_SECONDS = 30  # for the other ranks to notice that one has failed; the same as torchrun's
# Imported by every training run; torchvision is not preloaded, because only some tests need it. torch (2.15) imports
# torch.distributed.tensor, and with it sympy, for each run with a simulated card or torchvision, and torch._dynamo for
# each run with a double of the vendor's library. What does not exist in an older torch is left out.
PRELOADED = [
    *"numpy torch torch.distributed torch.distributed.tensor torch.nn.parallel torch.utils.data.distributed".split(),
    *"torch._dynamo PIL.Image tqdm".split(),
    "frozen",  # tests/frozen.py, after the other imports
]
_context = multiprocessing.get_context("forkserver")
# With this environment variable, networks have few channels, except in the last convolution, which feeds the
# classifier: in forked processes, and in new interpreters with this PYTHONPATH. Its value is JSON: entries that replace
# those of CONFIGURATIONS in vgglab.model.
NARROW, NARROW_VGG11 = "VGGLAB_TESTS_NARROW", [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 512, "M"]
NARROW_PATH = PROJECT / "tests/narrow"
PYTHONPATH = f"{NARROW_PATH}{os.pathsep}{PROJECT}"
# For tests whose own sitecustomize.py would hide that of NARROW_PATH.
NARROW_CODE = (NARROW_PATH / "sitecustomize.py").read_text()


def all_narrow() -> str:
    """Return a value of the environment variable ``NARROW`` that gives each network an eighth of its channels."""
    from vgglab.model import CONFIGURATIONS

    return json.dumps(
        {
            name: [*(layer if layer == "M" else layer // 8 for layer in layers[:-2]), *layers[-2:]]
            for name, layers in CONFIGURATIONS.items()
        }
    )


def python(*args: str | Path, **options) -> subprocess.CompletedProcess:
    """Run ``python`` with these arguments (``-m module``, ``-c code`` or a file) until it exits.

    Args:
        options: ``env``, ``cwd`` and ``preexec_fn`` as in ``subprocess.run``; ``autoload`` as in ``Child``.
    """
    child = Child(args, **options)
    try:
        child.wait()
    finally:
        child.kill()
    return child.completed()


def ranks(number: int, *args: str | Path, env: Mapping[str, str] | None = None, **options):
    """Run this many ranks with torchrun's environment variables; return one ``CompletedProcess`` for all of them.

    Its output is that of rank 0, then of rank 1 and so on; its exit code is that of the rank that failed first.
    """
    from torch.distributed import TCPStore

    # As with torchrun, the parent hosts the store, on a port that the system assigns, so that it is certainly free.
    store = TCPStore("127.0.0.1", 0, number, True, wait_for_workers=False)
    common = {
        **(os.environ if env is None else env),
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    children = [
        Child(args, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options) for rank in range(number)
    ]
    try:
        code = _wait_for_all(children)
    finally:
        for child in children:
            child.kill()
    results = [child.completed() for child in children]
    out, err = ("".join(getattr(result, name) for result in results) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(results[0].args, code, out, err)


def _wait_for_all(children: list[Child]) -> int:
    deadline, code, running = time.monotonic() + MAX_WAIT_SECONDS, 0, list(children)
    while running:
        ended = connection.wait([child.sentinel for child in running], max(0, deadline - time.monotonic()))
        if not ended and code:
            return code  # ranks that still wait for the failed one are killed
        assert ended, "timed out waiting for ranks"
        for child in [child for child in running if child.sentinel in ended]:
            running.remove(child)
            if child.wait() and not code:
                code, deadline = child.wait(), min(deadline, time.monotonic() + GRACE_SECONDS)
    return code


class Child:
    """A forked process that behaves like ``python`` with these arguments, in a separate process group."""

    def __init__(self, args, *, env=None, cwd=PROJECT, preexec_fn=None, autoload=False) -> None:
        """
        Args:
            autoload: load a card's library from ``PYTHONPATH``, as ``import torch`` does if one is installed.
        """
        self.args = [str(arg) for arg in args]
        self._folder = tempfile.TemporaryDirectory(prefix="child-")
        self._outputs = [os.path.join(self._folder.name, name) for name in ("stdout", "stderr")]
        settings = (dict(os.environ if env is None else env), str(cwd), self._outputs, _default_path())
        _start_server()
        self.process = _context.Process(target=_run_child, args=(self.args, *settings, preexec_fn, autoload))
        with _without_main():
            self.process.start()
        self.pid, self.sentinel = self.process.pid, self.process.sentinel

    def wait(self) -> int:
        """Wait for the exit and return the exit code, which is negative after a signal."""
        self.process.join(MAX_WAIT_SECONDS)
        assert self.process.exitcode is not None, f"timed out waiting for python {' '.join(self.args)}"
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the process and all that it has started, if they still run."""
        for kill, pid in ((os.killpg, self.pid), (os.kill, self.pid)):
            if self.process.exitcode is None or kill is os.killpg:
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
        self.process.join()

    def completed(self) -> subprocess.CompletedProcess:
        """Its exit code and output; waits for its exit."""
        out, err = (Path(file).read_text(errors="replace") if os.path.exists(file) else "" for file in self._outputs)
        self._folder.cleanup()
        return subprocess.CompletedProcess(["python", *self.args], self.wait(), out, err)


def fork_children_of_pytest():
    """As ``fork_children``, for processes that pytest starts without ``Child``; call the result to end it."""

    def start_helper(*args) -> None:
        _start_server()
        with _without_main():
            _context.Process(target=serve, args=args).start()

    return fork_children(functools.partial(_run_forked, _default_path()), start_helper)


@lru_cache(maxsize=None)
def _start_server() -> None:
    """Start it with one thread, as everywhere here, and without any ``PYTHONPATH`` that the first test has set."""
    _context.set_forkserver_preload(PRELOADED)
    saved = dict(os.environ)
    os.environ.update(
        OMP_NUM_THREADS="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0", PYTHONPATH=str(Path(__file__).resolve().parent)
    )
    os.environ[PADDING] = "-" * 30_000
    try:
        with _without_main():
            forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(saved)


@contextlib.contextmanager
def _without_main():
    """Hide ``__main__`` (pytest), so that multiprocessing does not import it in the child."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def server_pid() -> int | None:
    """Process id of the server, for measurements of the resources that its children have used."""
    return forkserver._forkserver._forkserver_pid


@lru_cache(maxsize=None)
def _default_path() -> list[str]:
    """``sys.path`` of a new interpreter without its first entry and without ``PYTHONPATH``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import sys; print('\\n'.join(sys.path[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()


def _run_child(args, environment, cwd, outputs, path, preexec_fn, autoload) -> None:
    """In the child: restore the state of a new interpreter, then run its arguments."""
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.exit(_run_as_interpreter(path, args, environment, cwd, preexec_fn, autoload))


def _run_forked(path, args, env, cwd) -> int:
    code = _run_as_interpreter(path, args[1:], env, cwd)
    threading._shutdown()  # waits for threads, like multiprocessing in _run_child
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return code


def _run_as_interpreter(path, args, environment, cwd, preexec_fn=None, autoload=False) -> int:
    """Run ``args`` in this process, which has just been forked, as a new interpreter would; return its exit code."""
    _reset_signals()
    os.environ.clear()
    os.environ.update(environment)
    show_environment(environment)
    os.chdir(cwd)
    _open_streams()
    if preexec_fn is not None:
        preexec_fn()
    if environment.get(FORKED) == "1":
        fork_children(functools.partial(_run_forked, path))
    extra = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*extra, *path]
    importlib.invalidate_caches()
    multiprocessing.process.ORIGINAL_DIR = cwd
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    try:
        if any(os.path.exists(os.path.join(folder, "sitecustomize.py")) for folder in extra):
            sys.modules.pop("sitecustomize", None)
            importlib.import_module("sitecustomize")
        if autoload and environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
            torch._import_device_backends()
        if NARROW in environment:
            importlib.import_module("vgglab.model").CONFIGURATIONS.update(json.loads(environment[NARROW]))
        _run([arg for arg in args if arg != "-u"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
        if not isinstance(error.code, (int, type(None))):
            print(error.code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    gc.collect()  # at the exit of an interpreter, the frames of its functions are gone too
    with contextlib.suppress(Exception):  # atexit has printed it, and it does not change the exit code
        atexit._run_exitfuncs()
    return code


def _reset_signals() -> None:
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP) and signal.getsignal(number) != signal.SIG_DFL:
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):  # does not exist on this system, or is reserved by the C library
                continue
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python raises an error instead
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _open_streams() -> None:
    """Open the three streams with the buffering that Python uses for a pipe."""
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def _run(args: list[str]) -> None:
    first = args[0]
    if first == "-m":
        sys.argv = args[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *args[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(args[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = list(args)
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        runpy.run_path(first, run_name="__main__")
