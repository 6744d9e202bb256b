"""TensorBoard scalars, named as in the original example and written while the run is active."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from vgglab.errors import UserError

MIN_FREE_BYTES = 2**20  # TensorBoard buffers data in memory for up to two minutes


class Scalars:
    """A listener for ``RunWriter`` that writes TensorBoard scalars over the optimizer step.

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
        self._open_writer = lambda: SummaryWriter(str(folder), purge_step=self._purge_step)
        self._writer: Any = None
        self._purge_step: int | None = None  # of a run resumed in place: scalars from this step on are discarded

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start" and event["first_step"]:
            self._purge_step = event["first_step"] + 1
        if event["event"] == "train":
            values = {
                "learning_rate": event["lr"],
                "loss": event["loss"],
                "train_accuracy_step": event["acc1"],
                "train_fps_step": None if event.get("simulated") else event["images_per_second"],
            }
        elif event["event"] == "eval":
            values = {"eval_accuracy_epoch": event["acc1"]}
        else:
            return
        # TensorBoard's thread writes later, and would fail with a separate traceback.
        if shutil.disk_usage(self._folder.parent).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._writer is None:
            self._writer = self._open_writer()
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, event["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
