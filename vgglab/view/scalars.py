"""TensorBoard scalars, named as in the original example and written while the run is active."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from vgglab.errors import UserError

MIN_FREE_BYTES = 2**20  # TensorBoard buffers data in memory for up to two minutes
# The names of the scalars, and the fields of the events that they are read from.
SCALARS = {
    "train": dict(learning_rate="lr", loss="loss", train_accuracy_step="acc1", train_fps_step="images_per_second"),
    "eval": dict(eval_accuracy_epoch="acc1"),
}


class Scalars:
    """A listener for ``RunWriter`` that writes TensorBoard scalars against the optimizer step.

    Raises:
        UserError: tensorboard is not installed.
        OSError: an event is written while the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: the package tensorboard is missing; run pip install tensorboard") from None
        self._folder = folder
        self._open_writer = partial(SummaryWriter, str(folder))
        self._writer: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start" and event["first_step"]:  # resumed in place: discard scalars from this step on
            self._open_writer = partial(self._open_writer, purge_step=event["first_step"] + 1)
        if event["event"] not in SCALARS:
            return
        # TensorBoard's thread writes later, and would fail with a separate traceback.
        if shutil.disk_usage(self._folder.parent).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._writer is None:
            self._writer = self._open_writer()
        values = {name: event[field] for name, field in SCALARS[event["event"]].items()}
        if event.get("simulated"):
            values.pop("train_fps_step", None)  # it has no meaning
        for name, value in {**event.get("scalars", {}), **values}.items():
            if value is not None:
                self._writer.add_scalar(name, value, event["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
