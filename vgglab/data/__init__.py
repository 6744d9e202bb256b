"""Load a data set, given by its name or folder, and make batches of images and labels.

``sets.py`` finds the images, ``digits.py`` writes the bundled data set, ``loader.py`` makes batches. Notebooks use the
names below. Each is imported on first use, because most of them need torch.
"""

import importlib
from typing import Any

_ELSEWHERE = {
    "ArrayPicture": "decode",
    "BatchReader": "loader",
    "CHANNEL_MEAN": "transform",
    "CHANNEL_STD": "transform",
    "CentreCrop": "transform",
    "Sample": "loader",
    "check_images": "check",
    "digits_folder": "digits",
    "normalised": "transform",
    "open_sets": "sets",
    "random_box": "transform",
    "read_index": "index",
    "train_batches": "loader",
}
__all__ = [*_ELSEWHERE]


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'vgglab.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vgglab.data.{_ELSEWHERE[name]}"), name)
