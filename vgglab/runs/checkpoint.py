"""Checkpoints: ``last.pt``, ``previous.pt`` and ``best.pt``, on the CPU; each is complete or absent.

A checkpoint holds all that a run needs to continue as if never stopped: weights, optimizer, loss scale, and how far it
was. There is no random state to keep, on any rank: each step, image and epoch draws from a seed that is made of the
run's seed and its own place. The file is a zip archive whose parts carry their checksums (CRC-32).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab.devices.compat import NotACheckpoint, damage_of, load_tensors
from vgglab.dist.interrupts import deferring_ctrl_c
from vgglab.errors import NOT_FINITE, UserError
from vgglab.storage.files import make_folder, refusing_links

if TYPE_CHECKING:
    from vgglab.trainer import TrainingState

FORMAT = "vgglab-1"
MAX_COUNT = 10**14  # of steps or images; readers of events accept ten times as many


class Checkpoint(Dict[str, Any]):
    """What a checkpoint file holds. ``format``, ``config`` and the rest are missing where it holds only weights."""

    def restore_model(self, network: nn.Module, name: str, to_train: bool = False) -> None:
        """Load the weights into ``network``: those that were evaluated, or those to continue with.

        Raises:
            UserError: the weights belong to a different network.
        """
        _restore_model(self, network, name, to_train)

    def restore_training(self, optimizer: Optimizer, optimizer_name: str) -> dict[str, Any]:
        """Load the optimizer's state and return the fields of ``TrainingState``.

        Raises:
            UserError: the file holds weights only, or another optimizer's state.
        """
        return _restore_training(self, optimizer, optimizer_name)


class CannotSave(Exception):
    """The file system refused; the checkpoints that were there are as they were."""


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: dict[str, Any],
    state: TrainingState,
    config: dict[str, Any],
    is_best: bool,
    average: nn.Module | None = None,
) -> None:
    """Write ``last.pt``, and keep the one before as ``previous.pt``; if ``is_best``, make it ``best.pt`` too.

    The weights that were evaluated are under ``model``; if they are an ``average``, the weights to continue training
    with are under ``trained``.

    Raises:
        CannotSave: no space, or no permission.
        UserError: the weights hold nan or infinity, and are not worth keeping.
    """
    content = {
        "format": FORMAT,
        "config": config,
        "epoch": state.epoch,
        "images": state.images,
        "step": state.step,
        "best": state.best,
        "num_poor": state.num_poor,
        "num_drops": state.num_drops,
        "model": (average or model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler,
    }
    if average is not None:
        content["trained"] = model.state_dict()
    content = _on_cpu(content)
    for name, value in content["model"].items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{name} is not finite after step {state.step}; {NOT_FINITE}")
    with deferring_ctrl_c():
        try:
            make_folder(folder)
            _write(folder, content, is_best)
        except OSError as error:
            with contextlib.suppress(OSError):
                (folder / "unfinished.tmp").unlink()
            raise CannotSave(error.strerror or str(error)) from None


def _write(folder: Path, content: Any, is_best: bool) -> None:
    last, unfinished = folder / "last.pt", folder / "unfinished.tmp"
    with open(unfinished, "wb", opener=refusing_links) as file:
        patient = _PatientFile(file)
        torch.save(content, patient)  # type: ignore[arg-type]  # all it asks for is write and flush
        if patient.error:
            raise patient.error
        file.flush()
        os.fsync(file.fileno())
    if last.exists():
        _share(last, folder / "previous.tmp")
        (folder / "previous.tmp").replace(folder / "previous.pt")
    unfinished.replace(last)  # the old last.pt stays until the new one is whole
    if is_best:
        _share(last, unfinished)
        unfinished.replace(folder / "best.pt")
    _flush_folder(folder)


class _PatientFile:
    """Takes all that is written and keeps the first error for later.

    torch's archive writer ends the process if the disk fills in the middle of a file.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self._file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def _flush_folder(folder: Path) -> None:
    """New names are on the disk only after their folder is, too."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _share(source: Path, target: Path) -> None:
    """A second name for the same file: the next save replaces ``source`` and leaves this one as it is."""
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
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


def read(path: str | Path) -> Checkpoint:
    """A checkpoint file, or the ``last.pt`` of a run directory.

    Also reads a bare state dict, or one under the key ``model``: other people's weights, good for
    ``--test-only``. No code in the file is ever run.

    Raises:
        UserError: no such file, or not a checkpoint, or a damaged one.
    """
    try:
        file = locate(path)
        damage = damage_of(file) if file.is_file() or not file.exists() else "not a regular file"
        if damage:
            raise UserError(f"is damaged ({damage})")
        content = load_tensors(file)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}); give a checkpoint or a run directory that has one"
        ) from None
    except NotACheckpoint as error:
        raise UserError(f"not a checkpoint that can be loaded safely ({error})") from None
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not _are_weights(weights):
        raise UserError("contains no model weights")
    is_ours = content.get("format") == FORMAT and isinstance(content.get("config"), dict)
    if is_ours and not all(_is_plain(value) for value in content["config"].values()):
        raise UserError("is damaged (a setting is of no type that a setting has)")
    return Checkpoint(content if is_ours else {"model": weights})


def newest(folders: Iterable[Path]) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest intact checkpoint in the run directories ``folders``, its content, and what was passed over and why.

    ``None`` and nothing where there is none.
    """
    files = [file for folder in folders for file in folder.glob("checkpoints/*.pt") if file.exists()]
    passed_over: list[str] = []
    for file in sorted(files, key=_age):
        try:
            content = read(file)
            if content.get("format") == FORMAT:
                return file, content, passed_over
            passed_over.append(f"{file} contains weights only")
        except UserError as error:
            passed_over.append(f"{file} {error}")
    return None, {}, passed_over


def _is_plain(value: Any) -> bool:
    is_line = isinstance(value, str) and value.isprintable()
    return is_line or value is None or type(value) in (bool, int, float)


NAMES = ("last.pt", "previous.pt", "best.pt")


def _age(file: Path) -> tuple[float, int]:
    """Newest first; of two names for one file the first of ``NAMES``."""
    return -file.stat().st_mtime, NAMES.index(file.name) if file.name in NAMES else len(NAMES)


def locate(path: str | Path) -> Path:
    """The checkpoint file for a run directory or a file name."""
    return Path(path, "checkpoints", "last.pt") if Path(path).is_dir() else Path(path)


def _are_weights(found: Any) -> bool:
    is_table = isinstance(found, dict) and bool(found)
    return is_table and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())


def carry_best(resumed: str | Path, folder: Path) -> None:
    """Give a resumed run the ``best.pt`` next to its checkpoint, until it has a better one."""
    best = locate(resumed).with_name("best.pt")
    if best.exists() and best.parent.absolute() != folder.absolute():
        folder.mkdir(parents=True, exist_ok=True)
        _share(best, folder / "best.pt")


def _restore_model(content: dict[str, Any], model: nn.Module, name: str, to_train: bool = False) -> None:
    """Load the weights into ``model``: those that were evaluated, or those to continue with.

    Raises:
        UserError: the weights belong to a different network.
    """
    written_by = content.get("config", {}).get("model", name)
    if written_by != name:
        raise UserError(f"is a checkpoint of {written_by}, but this run uses --model {name}")
    own, saved = model.state_dict(), content["model"]
    if to_train and "trained" in content:
        saved = content["trained"]
    if not _are_weights(saved):
        raise UserError("is damaged (trained: no weights)")
    for key in sorted(set(own) ^ set(saved)):
        where = "is missing" if key in own else "is not a layer of this network"
        raise UserError(f"does not fit --model {name}: {key} {where}")
    for key, value in own.items():
        if saved[key].shape != value.shape:
            there, here = tuple(saved[key].shape), tuple(value.shape)
            flags = "--num-classes, --head and --image-size"
            raise UserError(f"does not fit --model {name}: {key} is {there} there and {here} here; check {flags}")
    with _refusing_damage():
        model.load_state_dict(saved)


@contextlib.contextmanager
def _refusing_damage() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"is damaged ({str(error).splitlines()[0]})") from None


def _load(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Raises ValueError where what is kept for a weight has not its shape."""
    optimizer.load_state_dict(saved)
    for weight, kept in optimizer.state.items():
        for name, value in kept.items():
            is_number = value is None or isinstance(value, (int, float)) or getattr(value, "shape", None) == ()
            if not is_number and getattr(value, "shape", None) != weight.shape:
                raise ValueError(f"the optimizer's {name}")


def _restore_training(content: dict[str, Any], optimizer: Optimizer, optimizer_name: str) -> dict[str, Any]:
    """Load the optimizer's state and return how far the run had come; the options stay those of this run's flags.

    Raises:
        UserError: the file holds weights only, or another optimizer's state.
    """
    if content.get("format") != FORMAT:
        raise UserError("contains weights only; use it with --test-only")
    written_by = content["config"].get("optimizer")
    if written_by != optimizer_name:
        raise UserError(f"was written with --optimizer {written_by}, but this run uses --optimizer {optimizer_name}")
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with _refusing_damage():
        there = [len(group["params"]) for group in content["optimizer"]["param_groups"]]
        if there != [len(group["params"]) for group in optimizer.param_groups]:
            raise UserError(
                "was trained with weight decay on other layers; check --bias-weight-decay, --bn-weight-decay"
            )
        _load(optimizer, content["optimizer"])
        best = None if content["best"] is None else {name: float(content["best"][name]) for name in ("acc1", "acc5")}
        counts = {name: content.get(name, 0) for name in ("epoch", "images", "step", "num_poor", "num_drops")}
        are_counts = all(type(value) is int and 0 <= value < MAX_COUNT for value in counts.values())
        if not are_counts or (best and not all(0 <= value <= 100 for value in best.values())):
            raise ValueError("epoch, step, image count or accuracy out of range")
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)
        for weight in group["params"] if own.get("momentum") else ():
            if optimizer_name == "rmsprop":  # which looks for it only in its first step
                optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
    return {"best": best, **counts}
