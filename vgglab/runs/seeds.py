"""Train with several seeds, one after the other, to judge differences between runs.

    python -m vgglab.train --recipe quick --seeds 5          # seeds 1 to 5; --seed sets the first
    python -m vgglab.train --recipe quick --seeds 3,17,23
    vgglab.launch("--recipe quick", seeds=5)                 # in a notebook; nproc= for several cards

If the series was stopped, the same command with ``--run-dir`` continues it, even without ``--resume auto``. All runs
are in one folder, ``<output-dir>/runs/<time>-...-seeds/seed-<n>/``; ``vgglab.Seeds(folder)`` reads it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from vgglab.dist import ranks
from vgglab.dist.interrupts import handle_signals
from vgglab.dist.signals import STOP_SIGNALS
from vgglab.errors import UserError, printable
from vgglab.runs.run import Run, is_run_dir, run_path
from vgglab.settings.config import Request


def parse_seeds(config: Request) -> list[int]:
    """The seeds given by ``--seeds``. Raises UserError if they are invalid."""
    if config.resume not in (None, "auto") or config.test_only or config.fix_seed:
        raise UserError("--seeds: each run starts from scratch; leave out --resume, --test-only and --fix-seed")
    if config.resume and not config.run_dir:
        raise UserError("--seeds: to continue a series, give its folder: --run-dir runs/<name>-seeds")
    words = (config.seeds or "").split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
        raise UserError(f"--seeds: {config.seeds!r} is invalid; give a number of seeds (5) or a list (3,17,23)")
    values = [int(word) for word in words]
    if len(values) > 1:
        if config.seed is not None:
            raise UserError("--seeds: a list already names every seed; leave out --seed")
        if len(set(values)) < len(values) or max(values) >= 2**32:
            raise UserError(f"--seeds: {config.seeds!r} contains a duplicate seed, or one above 4294967295")
        return values
    if values[0] < 1:
        raise UserError("--seeds: must be at least 1")
    first = 1 if config.seed is None else config.seed
    if first + values[0] > 2**32:
        raise UserError(f"--seeds {values[0]}: starting at --seed {first}, the last seed would exceed 4294967295")
    return list(range(first, first + values[0]))


def seeds_folder(config: Request) -> Path:
    """The folder for all seeds: ``run_dir`` or a new one. Raises UserError if it contains anything but ``seed-*``."""
    path = Path(config.run_dir) if config.run_dir else Path(f"{run_path(config)}-seeds")
    others = [file.name for file in path.glob("*") if not file.name.startswith("seed-")]
    if others:
        raise UserError(
            f"--run-dir {path}: contains {others[0]}, which is not a folder named seed-<n>; choose another folder"
        )
    return path


def is_done(path: Path) -> bool:
    """Whether the run in this folder is done, so that a continued series skips it."""
    return is_run_dir(path) and Run(path).status == "done"


def remove_seeds_flag(argv: Sequence[str]) -> list[str]:
    """The command line without ``--seeds``, to which the flags of one seed can be added."""
    remaining, words = [], iter(argv)
    for word in words:
        if word == "--seeds":
            next(words, None)  # its value
        elif not word.startswith("--seeds="):
            remaining.append(word)
    return remaining


def train_seeds(argv: Sequence[str], config: Request, table: Callable[[Mapping[str, Sequence[Run]]], Any]) -> int:
    """Train with each seed in a separate process; stop if one fails, else print a table. Return the exit code.

    Raises:
        UserError: invalid seeds, or more than one rank.
    """
    seed_values = parse_seeds(config)
    if "RANK" in os.environ or config.world_size > 1:
        raise UserError("--seeds does not work with torchrun or Slurm; use --nproc N instead, or one --seed at a time")
    path = seeds_folder(config)
    for seed in seed_values:
        print(f"vgglab.train: seed {seed} ({seed_values.index(seed) + 1} of {len(seed_values)})", flush=True)
        if is_done(path / f"seed-{seed}"):
            print("vgglab.train: already done", flush=True)
            continue
        run_argv = [*remove_seeds_flag(argv), *flags_for_seed(seed, path)]
        code = _run(ranks.training_command(run_argv))
        if code in (ranks.EXIT_STOPPED, ranks.EXIT_INTERRUPTED):
            ranks.print_line(f"to continue the series, run the same command with --run-dir {path}")
        if code:
            return code
    print(table({printable(path.name): Seeds(path).runs}))
    print(f"runs: {path}")
    return 0


def flags_for_seed(seed: int, folder: Path) -> list[str]:
    """The flags for the run of one seed, new or continued."""
    return [f"--seed={seed}", f"--run-dir={folder / f'seed-{seed}'}", "--resume=auto"]


def _run(command: list[str]) -> int:
    """Run a process that ends when this one does, pass stop signals on to it, and return its exit code.

    It has its own session, so that Ctrl-C in a terminal reaches it only through this process.
    """
    environment = {**ranks.with_package_path(os.environ), ranks.TIED_TO_LAUNCHER: "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)

    def forward(signum: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signum)

    with handle_signals([*STOP_SIGNALS, signal.SIGINT], forward):
        return process.wait()


class Seeds:
    """A folder of runs that differ only in their seed."""

    run_type: type[Run] = Run

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if the folder does not exist or contains no run."""
        self.path = Path(path).absolute()
        self._runs: dict[str, Run] = {}
        if not self.runs:
            raise UserError(f"{self.path} contains no run in a folder named seed-<n>")

    @property
    def runs(self) -> list[Run]:
        """The runs that have started, sorted by seed."""
        folders = {folder.name[len("seed-") :]: folder for folder in self.path.glob("seed-*")}
        started = [seed for seed, folder in folders.items() if seed.isascii() and seed.isdigit() and is_run_dir(folder)]
        for seed in set(started) - set(self._runs):
            self._runs[seed] = self.run_type(folders[seed])
        return [self._runs[seed] for seed in sorted(started, key=int)]  # reused, so that each reads only new events
