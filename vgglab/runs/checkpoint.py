"""Checkpoints: ``last.pt``, ``previous.pt`` and ``best.pt``, with all tensors on the CPU; never partially written.

A checkpoint contains everything a run needs to continue as if it had never stopped: weights, optimizer state, loss
scale and progress. There is no random state to save: the seed of each step, image and epoch is computed from the run's
seed and the step, image or epoch number. The file is a zip archive with a checksum (CRC-32) for each part.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab.devices.compat import NotACheckpoint, describe_damage, load_tensors
from vgglab.dist.signals import defer_ctrl_c
from vgglab.errors import NOT_FINITE_ADVICE, UserError
from vgglab.optim import OPTIMIZERS
from vgglab.storage.files import make_folder, nofollow_opener

if TYPE_CHECKING:
    from vgglab.trainer import Trainer

FORMAT = "vgglab-1"
MAX_COUNT = 10**14  # of steps or images; readers of events accept ten times as many


class SaveError(Exception):
    """Raised when a checkpoint cannot be written; existing checkpoints are intact."""


def save(folder: Path, trainer: Trainer, is_best: bool) -> None:
    """Write ``last.pt``, keeping the old one as ``previous.pt``; if ``is_best``, also save the new one as ``best.pt``.

    The key ``model`` holds the weights used for evaluation; if they are a moving average, the key ``trained`` holds the
    weights from which training continues.

    Raises:
        SaveError: the file cannot be written, for example because the disk is full.
        UserError: the weights contain nan or infinity.
    """
    content = {
        "format": FORMAT,
        "config": {**trainer.config.as_dict(), "simulated": trainer.device.is_simulated},
        **vars(trainer.state),
        "model": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.device.scaler_state(),
    }
    if trainer.average is not None:
        content["trained"], content["model"] = content["model"], trainer.average.network.state_dict()
    content = _to_cpu(content)
    for name, value in content["model"].items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{name} is not finite after step {trainer.state.step}; {NOT_FINITE_ADVICE}")
    with defer_ctrl_c():
        try:
            make_folder(folder)
            _write(folder, content, is_best)
        except OSError as error:
            with contextlib.suppress(OSError):
                (folder / "unfinished.tmp").unlink()
            raise SaveError(error.strerror or str(error)) from None


def _write(folder: Path, content: Any, is_best: bool) -> None:
    last, unfinished = folder / "last.pt", folder / "unfinished.tmp"
    with open(unfinished, "wb", opener=nofollow_opener) as file:
        wrapper = _NonRaisingFile(file)
        torch.save(content, wrapper)  # type: ignore[arg-type]  # it needs only write and flush
        if wrapper.error:
            raise wrapper.error
        file.flush()
        os.fsync(file.fileno())
    if last.exists():
        _link_or_copy(last, folder / "previous.tmp")
        (folder / "previous.tmp").replace(folder / "previous.pt")
    unfinished.replace(last)  # the old last.pt stays until the new one is complete
    if is_best:
        _link_or_copy(last, unfinished)
        unfinished.replace(folder / "best.pt")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # only then do new names in the folder survive a crash of the machine
    finally:
        os.close(descriptor)


class _NonRaisingFile:
    """A file that accepts all data and stores the first error instead of raising it.

    torch's archive writer aborts the process if a write fails in the middle of a file.
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


def _link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy that is as old; the next save does not change it."""
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        times = source.stat()
        with contextlib.suppress(OSError):  # not possible for files of another owner, as on some network drives
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))  # --resume auto looks for the newest checkpoint


def _to_cpu(value: Any) -> Any:
    """The same structure with every tensor on the CPU, so that a machine without the card can load it."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, or the ``last.pt`` of a run directory.

    Also reads a bare state dict, or one under the key ``model``, for ``--test-only`` with weights from elsewhere. No
    code in the file is ever executed.

    Raises:
        UserError: the file does not exist, is not a checkpoint, or is damaged.
    """
    try:
        file = locate(path)
        damage = describe_damage(file) if file.is_file() or not file.exists() else "not a regular file"
        if damage:
            raise UserError(f"is damaged ({damage})")
        content = load_tensors(file)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}); give a checkpoint or a run directory that has one"
        ) from None
    except NotACheckpoint as error:
        raise UserError(f"is not a checkpoint that can be loaded safely ({error})") from None
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not _is_state_dict(weights):
        raise UserError("contains no model weights")
    is_complete = content.get("format") == FORMAT and isinstance(content.get("config"), dict)
    if is_complete and not all(_is_plain(value) for value in content["config"].values()):
        raise UserError("is damaged (a setting has an invalid type)")
    return Checkpoint(content if is_complete else {"model": weights})


def find_newest(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint in the run directories ``folders``, or None, and why others were skipped."""
    files = [file for folder in folders for file in folder.glob("checkpoints/*.pt") if file.exists()]
    unusable: list[str] = []
    for file in sorted(files, key=_newest_first):
        try:
            if read(file).get("format") == FORMAT:
                return file, unusable
            unusable.append(f"{file} contains weights only")
        except UserError as error:
            unusable.append(f"{file} {error}")
    return None, unusable


def _is_plain(value: Any) -> bool:
    is_line = isinstance(value, str) and value.isprintable()
    return is_line or value is None or type(value) in (bool, int, float)


FILE_NAMES = ("last.pt", "previous.pt", "best.pt")


def _newest_first(file: Path) -> tuple[float, int]:
    """Sort key: newest first; equally new files, such as hard links to one file, in the order of ``FILE_NAMES``."""
    return -file.stat().st_mtime, FILE_NAMES.index(file.name) if file.name in FILE_NAMES else len(FILE_NAMES)


def locate(path: str | Path) -> Path:
    """The checkpoint file at ``path``: ``last.pt`` if it is a run directory, otherwise ``path`` itself."""
    return Path(path, "checkpoints", "last.pt") if Path(path).is_dir() else Path(path)


def _is_state_dict(value: Any) -> bool:
    is_dict = isinstance(value, dict) and bool(value)
    return is_dict and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def copy_best(resumed: str | Path, folder: Path) -> None:
    """Copy the ``best.pt`` next to the resumed checkpoint to ``folder``; it stays until the run has a better one."""
    best = locate(resumed).with_name("best.pt")
    if best.exists() and best.parent.absolute() != folder.absolute():
        folder.mkdir(parents=True, exist_ok=True)
        _link_or_copy(best, folder / "best.pt")


class Checkpoint(Dict[str, Any]):
    """The content of a checkpoint file. If the file contains only weights, ``model`` is the only key."""

    def restore_model(self, model: nn.Module, name: str, for_training: bool = False) -> None:
        """Load the weights for evaluation into ``model`` or, with ``for_training``, those that training continues from.

        Raises:
            UserError: the weights belong to a different network.
        """
        saved_name = self.get("config", {}).get("model", name)
        if saved_name != name:
            raise UserError(f"is a checkpoint of {saved_name}, but this run uses --model {name}")
        own, saved = model.state_dict(), self["trained" if for_training and "trained" in self else "model"]
        if not _is_state_dict(saved):
            raise UserError("is damaged (its entry 'trained' contains no weights)")
        for key in sorted(set(own) ^ set(saved)):
            problem = "is missing" if key in own else "is not part of this network"
            raise UserError(f"does not fit --model {name}: {key} {problem}")
        for key, value in own.items():
            if saved[key].shape != value.shape:
                found, shape = tuple(saved[key].shape), tuple(value.shape)
                flags = "--num-classes, --head and --image-size"
                raise UserError(f"does not fit --model {name}: {key}: shape {found}, expected {shape}; check {flags}")
        with _explain_damage():
            model.load_state_dict(saved)

    def restore_training(self, optimizer: Optimizer, optimizer_name: str) -> dict[str, Any]:
        """Load the optimizer's state, but not its options, which come from the flags; return the progress of the run.

        Raises:
            UserError: the file contains only weights, or the state of another optimizer.
        """
        if self.get("format") != FORMAT:
            raise UserError("contains weights only; use it with --test-only")
        saved_name = self["config"].get("optimizer")
        if saved_name != optimizer_name:
            raise UserError(f"was written with --optimizer {saved_name}; this run uses --optimizer {optimizer_name}")
        with _explain_damage():
            saved_sizes = [len(group["params"]) for group in self["optimizer"]["param_groups"]]
            if saved_sizes != [len(group["params"]) for group in optimizer.param_groups]:
                raise UserError(
                    "was trained with weight decay on a different set of parameters; check --bias-weight-decay and "
                    "--bn-weight-decay"
                )
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self["optimizer"]["state"]})
            state_keys = OPTIMIZERS[optimizer_name].state_keys
            required = state_keys if self["step"] else ()
            for group in optimizer.param_groups:
                needs_buffer = bool(state_keys) and group.get("momentum")
                for weight in group["params"]:
                    state = optimizer.state.get(weight, {})
                    _check_optimizer_state(state, weight.shape, required)
                    if state and needs_buffer:  # without any state, the first step creates it
                        state.setdefault("momentum_buffer", torch.zeros_like(weight))
            best = None if self["best"] is None else {name: float(self["best"][name]) for name in ("acc1", "acc5")}
            counts = {name: self.get(name, 0) for name in ("epoch", "images", "step", "num_poor", "num_drops")}
            are_counts = all(type(value) is int and 0 <= value < MAX_COUNT for value in counts.values())
            if not are_counts or (best and not all(0 <= value <= 100 for value in best.values())):
                raise ValueError("epoch, step, image count or accuracy out of range")
        return {"best": best, **counts}


@contextlib.contextmanager
def _explain_damage() -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise UserError(f"is damaged (entry {error} is missing)") from None
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"is damaged ({first_line or type(error).__name__})") from None


def _check_optimizer_state(state: dict[str, Any], shape: torch.Size, required: Sequence[str]) -> None:
    """Check the optimizer state of a weight. Raises KeyError for a missing entry, ValueError for a wrong shape."""
    for name in required:
        state[name]
    for name, value in state.items():
        is_number = value is None or isinstance(value, (int, float)) or getattr(value, "shape", None) == ()
        if not is_number and getattr(value, "shape", None) != shape:
            raise ValueError(f"the optimizer's {name} has the wrong shape")
