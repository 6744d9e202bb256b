"""Run notebooks headless with papermill, then build a small website that works offline.

    python -m vgglab.book                                   # all notebooks, into build/notebooks
    python -m vgglab.book -p profile full -p device auto    # full-size runs, on the card if there is one
    python -m vgglab.book notebooks/08_report.ipynb -p folders /shared/runs --no-code --out /shared/report

Notebooks run in parallel, by default one per core. Those with ``"vgglab": {"alone": true}`` in their metadata measure
speeds, and run one at a time. All notebooks run in the current folder, so paths given with ``-p`` are relative to it.
Unlike papermill, this command rejects a parameter that none of the notebooks defines.
Exit codes: 0 done; 1 a notebook failed (the cell is named); 2 bad input (explained in one line); 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from vgglab.commands import call
from vgglab.dist.interrupts import handle_signals
from vgglab.dist.signals import STOP_SIGNALS
from vgglab.errors import UserError
from vgglab.lab.machine_speed import REFERENCE
from vgglab.settings.flags import AT_LEAST_1, OneLineParser
from vgglab.view.progress import duration
from vgglab.view.site import Chapter, check_overwritable, write_site

KERNEL_START_SECONDS = 1000  # maximum time for a kernel to start; papermill's default is 60
# Tags of the cells that papermill inserts, which are not counted in cell numbers.
PAPERMILL_TAGS = {"injected-parameters", "papermill-error-cell-tag"}


class Job(NamedTuple):
    """One notebook to execute: its source, its output, and its parameters."""

    source: Path
    target: Path
    parameters: list[str]  # words for papermill's command line
    is_alone: bool


def jobs_for(sources: Sequence[Path], out: Path, parameters: dict[str, str]) -> list[Job]:
    """Return one job per notebook, with those ``parameters`` that it defines.

    Notebooks that measure speed come first, then the others; in each group, the longest first.

    Raises:
        UserError: a notebook does not exist, has the name of another page, or would overwrite a file that this command
            did not write; or no notebook defines one of ``parameters``.
    """
    known = {source: _parameters_of(source) for source in dict.fromkeys(sources)}
    for name in parameters:
        if not any(name in names for names in known.values()):
            raise UserError(
                f"-p {name}: no such parameter; choose from {', '.join(sorted(set().union(*known.values())))}"
            )
    jobs: list[Job] = []
    source_files = {source.resolve() for source in known}
    for source, names in known.items():
        words: list[str] = []
        for name, value in parameters.items():
            if name in names:
                words += ["-r" if names[name] else "-p", name, value]  # -r: a string even if it looks like a number
        is_alone = _metadata_of(source).get("vgglab") == {"alone": True}
        target = out / source.name
        if source.stem == "index" or source.name in [job.target.name for job in jobs]:
            raise UserError(f"{source}: another page is also named {source.stem}.html; rename this notebook")
        if target.resolve() in source_files or not _may_overwrite(target):
            raise UserError(
                f"--out {out}: {source.name} already exists and was not written by this command; choose another folder"
            )
        jobs.append(Job(source, target, words, is_alone))
    return sorted(jobs, key=lambda job: (not job.is_alone, -REFERENCE["seconds"].get(job.source.stem, 0)))


def _parameters_of(source: Path) -> dict[str, bool]:
    """Map the name of each parameter of a notebook to whether its default is a string."""
    from papermill import inspect_notebook

    if not source.is_file():
        raise UserError(f"{source}: no such notebook")
    try:
        parameters = inspect_notebook(str(source))
        return {name: str(parameters[name]["default"]).startswith(("'", '"')) for name in parameters}
    except Exception as error:  # papermill raises many types of exceptions for an invalid file
        raise UserError(f"{source}: cannot be read as a notebook ({type(error).__name__})") from None


def _content_of(file: Path) -> dict[str, Any]:
    """The content of a notebook; empty if the file is missing or incomplete."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _metadata_of(file: Path) -> dict[str, Any]:
    return _content_of(file).get("metadata", {})


def _may_overwrite(target: Path) -> bool:
    """Whether the file may be overwritten: it does not exist, or papermill wrote it, completely or in part."""
    if target.is_symlink() or target.is_dir():
        return False
    if not target.exists() or "papermill" in _metadata_of(target):
        return True
    # A half-written file is not valid JSON, but papermill marks the metadata of each cell, too.
    return not _content_of(target) and '"papermill": {' in target.read_text(encoding="utf-8", errors="replace")


class Book:
    """Executes jobs and prints a line as each one ends; ``stop`` terminates the running jobs."""

    def __init__(self, num_parallel: int) -> None:
        self.num_parallel = num_parallel
        self._processes: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self._is_stopped = False

    def execute(self, jobs: Sequence[Job]) -> list[Chapter]:
        others = [job for job in jobs if not job.is_alone]
        with ThreadPoolExecutor(self.num_parallel) as pool:
            try:
                chapters = [self._execute_one(job, num_parallel=1) for job in jobs if job.is_alone]
                chapters += pool.map(lambda job: self._execute_one(job, self.num_parallel), others)
            except BaseException:
                self.stop()
                raise
        return sorted(chapters, key=lambda chapter: chapter.file.name)

    def _execute_one(self, job: Job, num_parallel: int) -> Chapter:
        words = [sys.executable, "-m", "papermill", "--log-level=ERROR", "--no-progress-bar", "-k", "python3"]
        words += ["--start-timeout", str(KERNEL_START_SECONDS)]  # generous, because the machine may be busy
        words += ["--cwd", str(Path.cwd()), str(job.source), str(job.target), *job.parameters]
        cores = max(1, (os.cpu_count() or 1) // num_parallel)
        environment = {"VGGLAB_UI": "static", "OMP_NUM_THREADS": str(cores), **os.environ}
        start = time.monotonic()
        code, output = self._run(words, environment)
        if code and not _has_begun(job.target):
            code, output = self._run(words, environment)
        seconds = time.monotonic() - start
        failure = "" if code == 0 else describe_failure(job.target) or output.strip()[-500:] or "exited without output"
        print(f"{job.source.stem:20s}{'FAILED' if failure else 'done'} in {duration(seconds)}", flush=True)
        if failure:
            print(failure, file=sys.stderr, flush=True)
        return Chapter(job.target, seconds, failure)

    def _run(self, words: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
        with self._lock:
            if self._is_stopped:
                raise KeyboardInterrupt
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(words, env=environment, **pipes)
            self._processes.append(process)
        output, _ = process.communicate()
        return process.returncode, output

    def stop(self) -> None:
        """Terminate the running jobs. A kernel exits when papermill does, and a run when its kernel does."""
        with self._lock:
            self._is_stopped = True
            for process in self._processes:
                if process.poll() is None:
                    process.terminate()


def _has_begun(executed: Path) -> bool:
    """Whether any cell was executed. A kernel can die before that: two that start together may get the same port."""
    return any(cell.get("execution_count") for cell in _content_of(executed).get("cells", ()))


def describe_failure(executed: Path) -> str:
    """Return a text that says which cell of an executed notebook failed, and why; empty if none did."""
    cells = _content_of(executed).get("cells", [])
    cells = [cell for cell in cells if not PAPERMILL_TAGS & set(cell["metadata"].get("tags", ()))]
    for number, cell in enumerate(cells, 1):
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                where = f"  cell {number} of {len(cells)}, In [{cell['execution_count']}]"
                line = "".join(cell["source"]).strip().splitlines()[0]
                return f"{where}, which begins: {line}\n  {output['ename']}: {output['evalue']}"
    return ""


parser = OneLineParser(prog="vgglab book", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("notebooks", nargs="*", type=Path, help="notebook files (default: notebooks/*.ipynb)")
parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
parser.add_argument("--out", type=Path, default=Path("build/notebooks"), help="output folder (default %(default)s)")
parser.add_argument(
    "--at-once",
    type=AT_LEAST_1,
    default=os.cpu_count() or 1,
    help="notebooks to run at the same time (default %(default)s)",
)
parser.add_argument("--no-code", action="store_true", help="leave the code cells out of the pages")


def main(argv: Sequence[str]) -> int:
    try:
        return _run_and_build(parser.parse_args(argv))
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; run pip install 'vgglab[lab]'") from None


def _run_and_build(arguments: argparse.Namespace) -> int:
    sources = arguments.notebooks or sorted(Path("notebooks").glob("*.ipynb"))
    if not sources:
        raise UserError("no notebooks found; pass their paths, or run this in the folder that contains notebooks/")
    import nbconvert  # noqa: F401  # fail now if it is missing, not after an hour of execution

    jobs = jobs_for(sources, arguments.out, dict(arguments.p))
    check_overwritable(arguments.out, [job.target.stem for job in jobs])
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: {error.strerror}; choose another folder") from None
    start = time.monotonic()
    with handle_signals(STOP_SIGNALS, signal.default_int_handler):  # same effect as Ctrl-C
        chapters = Book(arguments.at_once).execute(jobs)
    write_site(chapters, arguments.out, dict(arguments.p), with_code=not arguments.no_code)
    failed = {chapter.file.name for chapter in chapters if chapter.error}
    elapsed = duration(time.monotonic() - start)
    if failed:
        command = _repeat_command([job.source for job in jobs if job.target.name in failed], arguments)
        print(f"{len(failed)} of {len(chapters)} notebooks failed after {elapsed}; to run only those again: {command}")
        return 1
    noun = "notebook" if len(chapters) == 1 else "notebooks"
    print(f"{len(chapters)} {noun} done in {elapsed}; open {arguments.out / 'index.html'} in a browser")
    return 0


def _repeat_command(sources: Sequence[Path], arguments: argparse.Namespace) -> str:
    """The command that executes these notebooks again, with the same parameters, into a folder next to the site."""
    parameters = [word for pair in arguments.p for word in ("-p", *pair)] + ["--no-code"] * arguments.no_code
    interpreter = os.path.relpath(sys.executable) if sys.executable.startswith(f"{Path.cwd()}/") else sys.executable
    words = [interpreter, "-m", "vgglab.book", *map(str, sources), *parameters, "--out", f"{arguments.out}-again"]
    return " ".join(shlex.quote(word) for word in words)


if __name__ == "__main__":
    raise SystemExit(call("book"))
