"""Train VGG. Examples:

    python -m vgglab.train                                        # the bundled digits, VGG16
    python -m vgglab.train --data-path imagenet --batch-size 192  # a folder with train/ and val/
    python -m vgglab.train --help                                 # every flag

90 epochs on one card, then on eight cards with each of three launchers (the last as in the original example):

    python -u vgglab/train.py --data-path=imagenet --batch-size=192 --num_classes=1000 --epochs=90 --dropout_rate=0.5
    python -m vgglab.train --nproc 8 --data-path imagenet --batch-size 192 --dropout-rate 0.5
    torchrun --nproc_per_node=8 -m vgglab.train --data-path imagenet --batch-size 192 --dropout-rate 0.5
    python -u -m torch.distributed.launch --nproc_per_node=8 --master_addr=127.0.0.1 --master_port=34568 \\
        --use_env vgglab/train.py --data-path=imagenet --batch-size=192 --dropout_rate=0.5

To continue after a stop, or only to evaluate:

    python -m vgglab.train --resume runs/<run> --epochs 90
    python -m vgglab.train --run-dir runs/<run> --resume auto  # for a scheduler: the same command every time
    python -m vgglab.train --nproc 8 --max-restarts 3 --checkpoint-every 500
    python -m vgglab.train --resume runs/<run>/checkpoints/best.pt --test-only

All results are written to the run directory (see ``vgglab/runs/run.py``). Exit codes: 0 done, 1 a bug (with traceback),
2 bad input (one line on stderr), 75 stopped by SIGTERM, SIGUSR1 or SIGHUP after saving a checkpoint, 130 stopped by
Ctrl-C (pressed once: after saving a checkpoint; twice: at once, without saving).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from dataclasses import replace

if __name__ == "__main__" and not __package__:
    # When this is run as a file, Python puts its folder first on sys.path, where our "data" or "model"
    # would shadow other modules of that name. Import the package from the parent folder instead.
    from importlib.util import find_spec

    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _here]
    _spec = find_spec("vgglab")
    if _spec is None or os.path.dirname(os.path.abspath(str(_spec.origin))) != _here:
        sys.path.insert(0, os.path.dirname(_here))

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, NoReturn, Sequence

from vgglab.devices import import_torch, open_device
from vgglab.dist import interrupts, ranks, slurm, spawn
from vgglab.dist.interrupts import StopRequested, defer_signals
from vgglab.dist.signals import defer_ctrl_c
from vgglab.errors import UserError, error_context
from vgglab.runs import seeds
from vgglab.runs.report import steadiness_warning
from vgglab.runs.run import Run, has_run_files, run_path
from vgglab.settings import inheritance
from vgglab.settings.config import Request, Settings, complete
from vgglab.settings.parser import flags_given, parse_flags, settings_warnings
from vgglab.storage.schema import try_read_document
from vgglab.view.scalars import Scalars
from vgglab.view.seeds_table import seeds_table
from vgglab.view.terminal import Terminal

if TYPE_CHECKING:
    from vgglab.data.sets import DataSets
    from vgglab.devices.base import Device
    from vgglab.runs.checkpoint import Checkpoint
    from vgglab.runs.writer import RankWriter
    from vgglab.trainer import Trainer

EVALUATION_SETTINGS = ("data_path", "eval_step_per_epoch", "batch_size", "world_size")
MAX_WORKERS = 16  # the original example's default


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training command with these flags and return the exit code."""
    try:
        ranks.tie_to_launcher()
        argv = sys.argv[1:] if argv is None else argv
        slurm.adopt_slurm_environment()
        config = parse_flags(argv)
        if config.seeds is not None:
            return seeds.train_seeds(argv, config, seeds_table)
        if (config.nproc > 1 or config.max_restarts) and "RANK" not in os.environ:
            return spawn.train_on_ranks(argv, config.nproc, config.max_restarts)
        run_training(config, flags_given(argv))
    except UserError as error:
        ranks.report_failure(error, ranks.EXIT_BAD_INPUT)
        line = " ".join(str(error).splitlines())
        ranks.print_line(f"error: {ranks.prefix()}{line}")
        return ranks.EXIT_BAD_INPUT
    except KeyboardInterrupt:
        advice = f"; {ranks.resume_advice(ranks.run_dir)}" if ranks.run_dir else ""
        ranks.print_line(f"{ranks.prefix()}interrupted{advice}")
        return ranks.EXIT_INTERRUPTED
    except StopRequested as stopped:
        ranks.print_line(f"{ranks.prefix()}stopped {interrupts.reason()} {stopped}".rstrip())
        return ranks.EXIT_INTERRUPTED if interrupts.was_interrupted() else ranks.EXIT_STOPPED
    except _AbortedByRank0:
        return ranks.EXIT_BAD_INPUT
    except Exception as error:
        ranks.report_failure(error, 1)
        if ranks.has_lost_peers(error) and ranks.prefix():
            # The traceback of this rank would hide that of the rank that failed.
            ranks.print_line(f"{ranks.prefix()}lost connection to another rank ({str(error).splitlines()[0]})")
            return 1
        if ranks.prefix():
            ranks.print_line(f"{ranks.prefix()}failed:")
        raise
    return 0


class _AbortedByRank0(Exception):
    """Raised on the other ranks if rank 0 could not create the run directory; only rank 0 reports why."""


def run_training(request: Request, given: Sequence[str] = ()) -> None:
    """Open the device and the data, create the run directory, train, and write the report.

    Args:
        given: the names of the settings that the user chose; with ``resume``, inheritable settings that are not among
            them come from the earlier run.

    Raises:
        UserError: a problem was found before the first step (no run directory is created) or during training, for
            example an image that cannot be read.
    """
    import_torch(request.device)  # not earlier: invalid flags are reported without importing torch
    from vgglab.data.sets import open_sets
    from vgglab.optim import device_options

    saved, is_in_place = None, False
    notes: list[str] = []
    earlier = ranks.previous_run_dir()
    if earlier is not None:  # the launcher has restarted the ranks: the same run continues
        request = replace(request, run_dir=str(earlier), resume="auto")
    if request.resume == "auto":
        is_in_place = request.run_dir is not None and not request.test_only  # an evaluation would void training events
        checkpoint, notes = _find_checkpoint(request)
        request = replace(request, resume=checkpoint)
    if is_in_place and not request.resume:  # no checkpoint yet, but perhaps a config.json
        file = Path(str(request.run_dir), "config.json")
        with error_context(f"--resume auto: {file}"):
            request = inheritance.inherit(request, given, try_read_document(file))
    if request.resume:
        saved = _read_checkpoint(request.resume)
        with error_context(f"--resume {request.resume}"):
            request = inheritance.inherit(request, given, saved.get("config", {}))
    device = open_device(request.device, **device_options(request))
    sets = open_sets(request)
    device.open()
    try:
        settings = _resolve(request, device, sets)
        device.warnings += notes
        _build_and_run(settings, device, sets, saved, is_in_place)
    finally:
        device.close()


def _read_checkpoint(path: str) -> Checkpoint:
    from vgglab.runs import checkpoint

    file = checkpoint.locate(path)
    try:
        return checkpoint.read(file)
    except UserError as error:
        before = file.with_name("previous.pt")
        advice = (
            f"; use the checkpoint before it: --resume {before}" if file.name == "last.pt" and before.exists() else ""
        )
        raise UserError(f"--resume {file}: {error}{advice}") from None


def _find_checkpoint(request: Request) -> tuple[str | None, list[str]]:
    """For ``--resume auto``: return the newest intact checkpoint, if any, and a note for each that cannot be used.

    Raises:
        UserError: ``run_dir`` has checkpoints, but none can be used; a new start would overwrite them.
    """
    from vgglab.runs import checkpoint

    runs = Path(request.output_dir, "runs")
    folders = [Path(request.run_dir)] if request.run_dir else sorted(runs.glob("*"))
    file, unusable = checkpoint.find_newest(folders)
    notes = [f"--resume auto: {text}, so it was not used" for text in unusable]
    if file is None and unusable and request.run_dir:
        advice = f"to start from the beginning, move {request.run_dir}/checkpoints elsewhere"
        reasons = "; ".join(unusable)
        raise UserError(f"--resume auto: no checkpoint in {request.run_dir} can be used: {reasons}; {advice}")
    if file is None and (notes or (request.run_dir and has_run_files(Path(request.run_dir)))):
        notes.append(f"--resume auto: no valid checkpoint in {request.run_dir or runs}; starting from the beginning")
    return (None if file is None else str(file)), notes


def _resolve(request: Request, device: Device, sets: DataSets) -> Settings:
    """Fill in the settings that the flags left open, so that config.json records what was used."""
    from vgglab.model import head_for

    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", device.world_size))
    default_workers = min(MAX_WORKERS, max(1, ranks.num_cores() // local_ranks))
    settings = complete(
        request,
        device=device.kind,
        amp=device.amp_dtype is not None,
        amp_dtype=device.amp_dtype,
        tf32=device.tf32,
        channels_last=device.channels_last,
        fused=device.fused,
        data_path=sets.data_path,
        world_size=device.world_size,
        num_classes=sets.num_classes,
        image_size=sets.image_size,
        decoder=sets.decoder,
        head=head_for(request.model, sets.image_size, request.head),
        workers=default_workers if request.workers is None else request.workers,
        seed=device.draw_seed() if request.seed is None else request.seed,
    )
    path = str(run_path(settings))
    if request.run_dir is None or device.world_size > 1:
        path = device.broadcast(path)  # the name contains the time of rank 0
    return replace(settings, run_dir=path)


def _build_and_run(
    config: Settings, device: Device, sets: DataSets, saved: Checkpoint | None, is_in_place: bool
) -> None:
    """Build the trainer and run it. The trainer must not outlive this call, or DDP hangs at exit on torch 1.10."""
    from vgglab.runs.writer import RankWriter
    from vgglab.trainer import Trainer

    trainer = Trainer(config, device, sets, saved)
    if saved is not None and not config.test_only:
        trainer.warnings += [f"--resume: {change}" for change in inheritance.changed_settings(saved, config.as_dict())]
        if trainer.state.best is not None and _eval_key(saved.get("config", {})) != _eval_key(config.as_dict()):
            trainer.state.best = None
            trainer.warnings.append(
                "--resume: the best accuracy so far was measured on different held-out images "
                "(--data-path, --eval-step-per-epoch, --batch-size or --nproc differs), so it is not carried over"
            )
    path = Path(config.run_dir)
    if device.rank == 0:
        _run_rank_0(trainer, path, is_in_place)
        return
    if not device.true_on_all_ranks(True):  # rank 0 creates the run directory first
        raise _AbortedByRank0
    ranks.set_run_dir(path)
    run = RankWriter(path, device.rank, device.is_simulated)
    with run.record_output(), defer_signals():
        _train_or_evaluate(trainer, run)


def _eval_key(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """The settings that determine which held-out images are evaluated."""
    data_path, limit, batch_size, num_ranks = (settings.get(name) for name in EVALUATION_SETTINGS)
    return (data_path, limit) if limit == -1 else (data_path, limit, batch_size, num_ranks)


def _train_or_evaluate(trainer: Trainer, run: RankWriter) -> None:
    from vgglab.devices.memory import is_out_of_memory
    from vgglab.pace import Pace

    try:
        if trainer.config.test_only:
            trainer.evaluate(run)
        else:
            trainer.fit(run, Pace(trainer.config, trainer.device, run))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no memory"])[0]
        batch_size, kind = trainer.config.batch_size, trainer.device.kind
        raise UserError(f"--batch-size {batch_size}: out of memory on {kind} ({reason})") from error


def _run_rank_0(trainer: Trainer, path: Path, is_in_place: bool) -> None:
    """Train or evaluate on rank 0; write the run directory, including the report, however the run ends."""
    from vgglab.optim import OPTIMIZERS
    from vgglab.runs import checkpoint
    from vgglab.runs.writer import RunWriter

    config, device = trainer.config, trainer.device
    terminal = Terminal()
    scalars = [Scalars(path / "tensorboard")] if config.tensorboard else []
    is_continued = is_in_place and has_run_files(path)
    try:
        run = RunWriter(path, [terminal, *scalars], device.is_simulated, is_continued)
        run.write_settings(config.as_dict(), device.describe(), device.world_size)
    except UserError:
        device.true_on_all_ranks(False)
        raise
    ranks.delete_failures(path)
    ranks.set_run_dir(path)
    device.true_on_all_ranks(True)
    status, failure = "failed", None
    with run.record_output(), defer_signals():
        try:
            terminal.print_line(f"run directory: {path}")
            if config.resume and not config.test_only:
                terminal.print_line(f"resuming from {config.resume}")
            if not run.has_lock:
                run.event(
                    "warning",
                    text=f"{path}: this file system does not support file locking; "
                    "do not start a second run in this folder",
                )
            trainer.record_start(run)
            for text in [*trainer.warnings, *settings_warnings(config, OPTIMIZERS)]:
                run.event("warning", text=text)
            if config.resume and not config.test_only:
                checkpoint.copy_best(config.resume, path / "checkpoints")
            _train_or_evaluate(trainer, run)
            failure = run.lost_last_checkpoint or None
            status = "failed" if failure else "done"
            warning = "" if device.is_simulated else steadiness_warning(Run(path).report())
            if warning:
                run.event("warning", text=warning)
        except (KeyboardInterrupt, StopRequested):
            status = "interrupted"
            raise
        except BaseException as error:
            if interrupts.was_interrupted() and ranks.has_lost_peers(error):  # the other ranks exited first
                status = "interrupted"
                raise KeyboardInterrupt from None
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            with defer_ctrl_c():
                run.event("end", status=status, error=failure, **device.usage())
                with contextlib.suppress(UserError):  # if there is nothing to report yet
                    run.write_report(Run(path).report())
                run.close()
        if run.unwritten_message():
            raise UserError(run.unwritten_message())
        report = Run(path).report()
        best = "" if report["acc1"] is None else f"best top-1 {report['acc1']:.2f} %; "
        terminal.print_line(f"{best}total time {report['training_time']} (h:mm:ss); report: {path / 'report.json'}")


def run_and_exit(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the training command as the only task of this process, then exit."""
    interrupts.exits_with_run = True
    try:
        code = main(argv)
    except KeyboardInterrupt:  # Ctrl-C again, while the first was being handled
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ranks.print_line("interrupted")
        code = ranks.EXIT_INTERRUPTED
    except Exception:  # printed here, because Python would keep the frames, and with them the loader's workers
        with contextlib.suppress(OSError):
            traceback.print_exc()
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    gc.collect()  # the loader's workers exit when the last reference to the batches is gone
    ranks.exit_process(code)


if __name__ == "__main__":
    from vgglab import train  # not the copy in __main__, so that each class exists only once

    train.run_and_exit()
