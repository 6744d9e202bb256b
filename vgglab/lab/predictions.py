"""Predictions of a trained network for the held-out images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from vgglab.data.images import Split
from vgglab.data.loader import eval_batches
from vgglab.data.sets import open_sets
from vgglab.data.transform import as_tensor, normalised
from vgglab.devices import open_device
from vgglab.errors import UserError, error_context
from vgglab.model import VGG, build
from vgglab.runs import checkpoint
from vgglab.runs.run import Run
from vgglab.settings.config import Request, Settings, complete
from vgglab.settings.inheritance import inherited_settings

MAX_CLASSES = 10**6  # largest number accepted from a run's settings; ImageNet-21k has 21,841


class Prediction(NamedTuple):
    """The prediction for one image; ``probability`` (0 to 1) is that of the predicted class."""

    file: str  # or the index of the image, if the data set has no files
    actual: str
    predicted: str
    probability: float
    split: Split
    position: int  # in the split

    @property
    def is_right(self) -> bool:
        return self.actual == self.predicted

    def pixels(self) -> Any:
        """Return the whole image as a uint8 array ``(H, W, 3)``."""
        return as_tensor(self.split.images.open(self.position, "pil").pixels()).numpy()


def load_network(run: Run | str | Path, which: str = "best") -> VGG:
    """Load the network of a run from its ``best`` or ``last`` checkpoint, on the CPU and in evaluation mode.

    Raises:
        UserError: the run has no such checkpoint.
    """
    run = run if isinstance(run, Run) else Run(run)
    file = run.checkpoint(which)
    config = _evaluation_settings(run)
    network = build(config.model, num_classes=config.num_classes, head=config.head)
    with error_context(str(run.path)):
        checkpoint.read(file).restore_model(network, config.model)
    return network.eval()


@torch.no_grad()
def predict(run: Run | str | Path, which: str = "best") -> list[Prediction]:
    """Predict the classes of a run's held-out images, in order, with its ``best`` or ``last`` checkpoint, on the CPU.

    Raises:
        UserError: the run has no such checkpoint, or its images no longer exist.
    """
    run = run if isinstance(run, Run) else Run(run)
    network = load_network(run, which)
    config = _evaluation_settings(run)
    sets = open_sets(config)
    names = [*sets.val.classes, *(f"unused {i}" for i in range(len(sets.val.classes), sets.num_classes))]
    predictions = []
    for batch in eval_batches(sets, config, open_device("cpu")).epoch(0):
        probability, predicted_labels = network(normalised(batch.images)).softmax(dim=1).max(dim=1)  # (N,), (N,)
        for row in zip(batch.indices, batch.labels.tolist(), predicted_labels.tolist(), probability.tolist()):
            index, label, predicted, confidence = row
            image = sets.val.images.name(index)
            predictions.append(Prediction(image, names[label], names[predicted], confidence, sets.val, index))
    return predictions


def _evaluation_settings(run: Run) -> Settings:
    """Return the settings of the run, changed to evaluate all held-out images in this process."""
    with error_context(f"{run.path}/config.json"):
        config = Request(**inherited_settings((), run.config))
        if config.num_classes is None or config.num_classes > MAX_CLASSES:
            raise UserError("has no valid num_classes")
    # "auto", because simplejpeg may be missing on this machine.
    return complete(config, test_only=True, workers=0, eval_step_per_epoch=-1, decoder="auto")
