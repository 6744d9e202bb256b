"""Checkpoints: ``last.pt`` and ``best.pt``, on the CPU, whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab.compat import NotACheckpoint, load_tensors
from vgglab.errors import UserError

FORMAT = "vgglab-1"


@dataclass
class Progress:
    """How far a run has come. ``epoch`` epochs and ``step`` optimizer steps are done."""

    epoch: int = 0
    step: int = 0
    best: dict[str, float] | None = None  # acc1 and acc5 in percent, each the highest so far


def save(
    folder: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, config: dict[str, Any], is_best: bool
) -> None:
    """Write ``last.pt``; if ``is_best``, make it ``best.pt`` too."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "config": config,
        "epoch": progress.epoch,
        "step": progress.step,
        "best": progress.best,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with _undisturbed():
        _write(folder, content, is_best)


def _write(folder: Path, content: Any, is_best: bool) -> None:
    last, unfinished = folder / "last.pt", folder / "unfinished.tmp"
    with open(unfinished, "wb") as file:
        torch.save(_on_cpu(content), file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(last)  # the old last.pt stays until the new one is whole
    if is_best:
        _share(last, unfinished)
        unfinished.replace(folder / "best.pt")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the block is done: inside torch.save it would come out as an error of torch's own."""
    if threading.current_thread() is not threading.main_thread():  # signals do not come here
        yield
        return
    waiting: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if waiting:
        raise KeyboardInterrupt


def _share(source: Path, target: Path) -> None:
    """A second name for the same file: the next save replaces ``source`` and leaves this one as it is."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _on_cpu(value: Any) -> Any:
    """The same structure with every tensor on the CPU: readable where the card is not."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint file, or the ``last.pt`` of a run directory.

    Also reads a bare state dict, or one under the key ``model``: other people's weights, good for
    ``--test-only``. No code in the file is ever run.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "checkpoints" / "last.pt"
    try:
        content = load_tensors(file)
    except OSError as error:
        raise UserError(f"--resume {file}: cannot be read ({error.strerror})") from None
    except NotACheckpoint as error:
        raise UserError(f"--resume {file}: not a checkpoint that can be read safely ({error})") from None
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"--resume {file}: holds no model weights")
    return content if "model" in content else {"model": weights}


def restore_model(content: dict[str, Any], model: nn.Module, name: str, path: str) -> None:
    """Load the weights into ``model``. Raises UserError if they are another network's."""
    written_by = content.get("config", {}).get("model")
    if written_by not in (None, name):
        raise UserError(f"--resume {path}: is a checkpoint of {written_by}, this run is --model {name}")
    own, saved = model.state_dict(), content["model"]
    for key in sorted(set(own) ^ set(saved)):
        where = "is missing" if key in own else "is not a layer of this network"
        raise UserError(f"--resume {path}: does not fit --model {name}: {key} {where}")
    for key, value in own.items():
        if saved[key].shape != value.shape:
            raise UserError(
                f"--resume {path}: does not fit --model {name}: {key} is {tuple(saved[key].shape)} there "
                f"and {tuple(value.shape)} here; check --num-classes, --head and --image-size"
            )
    model.load_state_dict(saved)


def restore_training(content: dict[str, Any], optimizer: Optimizer, path: str) -> Progress:
    """Load the optimizer and return how far the run had come. Raises UserError if the file does not say."""
    if content.get("format") != FORMAT:
        raise UserError(f"--resume {path}: holds weights only; use it with --test-only")
    try:
        optimizer.load_state_dict(content["optimizer"])
    except ValueError:
        raise UserError(f"--resume {path}: was written with another --optimizer or --bn-weight-decay") from None
    return Progress(content["epoch"], content["step"], content["best"])
