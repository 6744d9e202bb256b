"""Processes for tests that need one but are not about starting it: forked from a server that has imported torch.

``python("-m", "vgglab.train", ...)`` gives what ``shell("python", "-m", "vgglab.train", ...)`` gives, without the
seconds that every new interpreter spends on ``import torch``. The server (Python's own forkserver, one per pytest
process, started when first needed) knows torch and its friends but no module of vgglab: each child imports the package
that its ``PYTHONPATH`` names, and keeps its own time.

What a fork cannot show, and needs ``shell``: how an interpreter starts, in which order things are imported, variables
that torch or the C library reads at that time, the environment as ``/proc`` shows it, how Python is taken apart.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from multiprocessing import connection, forkserver
from pathlib import Path
from types import ModuleType
from typing import Mapping

PROJECT = Path(__file__).resolve().parent.parent
# After so long something hangs; no test says how fast a machine has to be.
PATIENCE_SECONDS = 600
GRACE_SECONDS = 30  # for the other ranks to notice that one has failed; torchrun's figure
# What a training run imports; torchvision is imported only where a test needs it.
PRELOADED = "numpy torch torch.distributed torch.nn.parallel torch.utils.data.distributed PIL.Image tqdm".split()
_context = multiprocessing.get_context("forkserver")
# In an environment with this variable VGG11 has few channels; the last convolution keeps its own, for the classifier.
NARROW, NARROW_VGG11 = "VGGLAB_TESTS_NARROW", [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 512, "M"]


def python(*words: str | Path, **options) -> subprocess.CompletedProcess:
    """``python`` with these words after it (``-m module``, ``-c code`` or a file), to its end.

    Args:
        options: ``env``, ``cwd``, ``preexec_fn`` as of ``subprocess.run``; ``autoload`` as in ``Child``.
    """
    child = Child(words, **options)
    try:
        child.wait()
    finally:
        child.kill()
    return child.completed()


def ranks(number: int, *words: str | Path, env: Mapping[str, str] | None = None, **options):
    """Start this many ranks with torchrun's environment variables; one ``CompletedProcess`` for all of them.

    Its output is that of rank 0, then of rank 1 and so on; its code that of the first that failed.
    """
    from torch.distributed import TCPStore

    # As torchrun does it, the parent holds the meeting place: its port is taken, not guessed to be free.
    store = TCPStore("127.0.0.1", 0, number, True, wait_for_workers=False)
    common = {
        **(os.environ if env is None else env),
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    children = [
        Child(words, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options) for rank in range(number)
    ]
    try:
        code = _wait_for_all(children)
    finally:
        for child in children:
            child.kill()
    ended = [child.completed() for child in children]
    out, err = ("".join(getattr(one, name) for one in ended) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(ended[0].args, code, out, err)


def _wait_for_all(children: list[Child]) -> int:
    deadline, code, left = time.monotonic() + PATIENCE_SECONDS, 0, list(children)
    while left:
        ended = connection.wait([child.sentinel for child in left], max(0, deadline - time.monotonic()))
        if not ended and code:
            return code  # those that still wait for the one that failed are killed
        assert ended, "waited in vain for ranks"
        for child in [child for child in left if child.sentinel in ended]:
            left.remove(child)
            if child.wait() and not code:
                code, deadline = child.wait(), min(deadline, time.monotonic() + GRACE_SECONDS)
    return code


class Child:
    """A forked process that behaves like ``python`` with these arguments, in a separate process group."""

    def __init__(self, words, *, env=None, cwd=PROJECT, preexec_fn=None, autoload=False) -> None:
        """
        Args:
            autoload: load a card's library from its ``PYTHONPATH``, as ``import torch`` does where one is installed.
        """
        self.words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory(prefix="child-")
        self._outputs = [os.path.join(self._folder.name, name) for name in ("stdout", "stderr")]
        setting = (dict(os.environ if env is None else env), str(cwd), self._outputs, _standard_path())
        _start_server()
        self.process = _context.Process(target=_become, args=(self.words, *setting, preexec_fn, autoload))
        with _without_main():
            self.process.start()
        self.pid, self.sentinel = self.process.pid, self.process.sentinel

    def wait(self) -> int:
        """Its exit code; that of a signal is negative."""
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode is not None, f"waited in vain for python {' '.join(self.words)}"
        return self.process.exitcode

    def kill(self) -> None:
        """It and what it has started, if anything is left of them."""
        for kill, number in ((os.killpg, self.pid), (os.kill, self.pid)):
            if self.process.exitcode is None or kill is os.killpg:
                with contextlib.suppress(ProcessLookupError):
                    kill(number, signal.SIGKILL)
        self.process.join()

    def completed(self) -> subprocess.CompletedProcess:
        """Its code and what it has written, once it has ended."""
        out, err = (Path(file).read_text(errors="replace") if os.path.exists(file) else "" for file in self._outputs)
        self._folder.cleanup()
        return subprocess.CompletedProcess(["python", *self.words], self.wait(), out, err)


@lru_cache(maxsize=None)
def _start_server() -> None:
    """One thread, as all here; and nothing of what the test that happens to come first has put into the environment."""
    _context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.pop("PYTHONPATH", None)
    os.environ.update(OMP_NUM_THREADS="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    try:
        with _without_main():
            forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _without_main():
    """What runs the tests is nothing that a child should import first, as multiprocessing would have it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def server_pid() -> int | None:
    """For those who count what its children have used."""
    return forkserver._forkserver._forkserver_pid


@lru_cache(maxsize=None)
def _standard_path() -> list[str]:
    """Where an interpreter looks for modules after its first folder and its ``PYTHONPATH``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import sys; print('\\n'.join(sys.path[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()


def _become(words, environment, cwd, outputs, path, preexec_fn, autoload) -> None:
    """In the child: all that a new interpreter would find set, then what it was to run."""
    os.setpgid(0, 0)
    _reset_signals()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _open_streams(outputs)
    if preexec_fn is not None:
        preexec_fn()
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
            importlib.import_module("vgglab.model").CONFIGURATIONS["vgg11"] = NARROW_VGG11
        _run([word for word in words if word != "-u"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
        if not isinstance(error.code, (int, type(None))):
            print(error.code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    gc.collect()  # as where an interpreter ends, whose functions have returned by now
    with contextlib.suppress(Exception):  # which it has printed, and which changes no interpreter's exit code
        atexit._run_exitfuncs()
    sys.exit(code)  # multiprocessing waits for threads, flushes and calls os._exit


def _reset_signals() -> None:
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP) and signal.getsignal(number) != signal.SIG_DFL:
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):  # not a signal of this system, or the C library's own
                continue
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python raises an error instead
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _open_streams(outputs: list[str]) -> None:
    """Files for the three streams, buffered as Python does for a pipe."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    for number, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def _run(words: list[str]) -> None:
    kind = words[0]
    if kind == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = list(words)
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")
