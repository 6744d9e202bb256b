"""The last line of ``make test``: the result, the time, and the command that repeats the failed tests.

A pytest plugin, loaded by the Makefile with ``-p tests.last_line``; its line follows pytest's summary line.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Iterable

import pytest

MAX_LISTED_FAILURES = 5  # with more failures, the command lists their files instead
KERNEL_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def repeat_command(failed: Iterable[str], marker: str = "", keyword: str = "") -> str:
    """The command that runs only these tests again: ``failed`` are node ids, ``keyword`` is the value of -k."""
    ids = list(dict.fromkeys(name.split("@")[0] if "@" in name.rpartition("]")[2] else name for name in failed))
    if len(ids) > MAX_LISTED_FAILURES:
        ids = list(dict.fromkeys(name.split("::")[0] for name in ids))
    interpreter = Path(sys.executable)
    if interpreter.is_relative_to(Path.cwd()):
        interpreter = interpreter.relative_to(Path.cwd())
    kernels = [f"{name}={os.environ[name]}" for name in KERNEL_VARIABLES if name in os.environ]
    selection = [*(["-m", marker] if marker == "long" else []), *(["-k", keyword] if keyword else [])]
    return shlex.join([*kernels, str(interpreter), "-m", "pytest", *selection, *ids])


class LastLine:
    def __init__(self) -> None:
        self.start = time.monotonic()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Iterable[None]:
        """Wrap the terminal reporter's hook, which prints pytest's summary line."""
        yield
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            option = session.config.option
            reporter.write_line(self.line(reporter.stats, int(exitstatus), option.markexpr, option.keyword))

    def line(self, stats: dict, code: int, marker: str = "", keyword: str = "") -> str:
        minutes, seconds = divmod(round(time.monotonic() - self.start), 60)
        took = f"{minutes} min {seconds:02d} s"
        failed = [report.nodeid for kind in ("failed", "error") for report in stats.get(kind, [])]
        num_passed, num_skipped = len(stats.get("passed", [])), len(stats.get("skipped", []))
        if failed:
            command = repeat_command(failed, marker, keyword)
            return f"{len(failed)} failed, {num_passed} passed after {took}; to repeat just what failed: {command}"
        if code == pytest.ExitCode.INTERRUPTED:
            return f"interrupted after {took}; {num_passed} passed until then, none failed"
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            return "no test was chosen"
        if code:
            return f"pytest ended with exit code {code} after {took}: see above"
        return f"all {num_passed} tests passed after {took} ({num_skipped} skipped); next: make lab opens the notebooks"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not in xdist's workers
        config.pluginmanager.register(LastLine(), "the last line")
