"""Named data sets, kept in the cache folder; torchvision downloads most of them on first use.

torchvision shows the progress, verifies checksums, and skips files that already exist.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import tempfile
from array import array
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch

from vgglab.data.digits import digits_folder
from vgglab.data.images import ArrayImages, FakeImages, Split
from vgglab.data.transform import Preprocessing
from vgglab.errors import UserError
from vgglab.storage.cache import best_effort_lock, cache_folder

# Debian's package dataset-fashion-mnist installs the four files here.
PACKAGED_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
NUM_FAKE_IMAGES = {"train": 1_281_167, "val": 50_000}  # as many as in ImageNet
NUM_FAKE_CLASSES = 1000


class NamedSet(NamedTuple):
    """A named data set: either ``folder`` returns a root with train/ and val/, or ``split`` returns one split.

    Both are None for the user's own folder.
    """

    preprocessing: Preprocessing
    archives: str  # files to download by hand if the download fails; empty if there is nothing to download
    folder: Callable[[], Path] | None = None
    split: Callable[[str, int], Split] | None = None  # takes "train" or "val", and the image size


def _fashion_mnist(split: str, size: int) -> Split:
    raw = cache_folder() / "FashionMNIST" / "raw"
    for archive in PACKAGED_FASHION_MNIST.glob("*.gz"):
        _decompress(archive, raw / archive.stem)  # torchvision would reject Debian's archives, whose checksums differ
    dataset = _load_from_torchvision("FashionMNIST", train=split == "train")
    return Split(ArrayImages(dataset.data, f"fashion-mnist/{split}"), dataset.targets.tolist(), list(dataset.classes))


def _decompress(archive: Path, target: Path) -> None:
    """Unpack into a temporary file, then rename it, because several ranks may start at once."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(archive) as source, tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
        shutil.copyfileobj(source, temporary)
    os.replace(temporary.name, target)


def _cifar(name: str, split: str, size: int) -> Split:
    dataset = _load_from_torchvision(name, train=split == "train")
    pixels = ArrayImages(torch.from_numpy(dataset.data), f"{name.lower()}/{split}")
    return Split(pixels, list(dataset.targets), list(dataset.classes))


def _imagenette() -> Path:
    """Return the folder of Imagenette (images with a shorter side of 320 pixels), downloading it if it is missing."""
    root = cache_folder() / "imagenette2-320"
    if not (root / "train").is_dir():
        _load_from_torchvision("Imagenette", split="train", size="320px")
    return root


def _load_from_torchvision(name: str, **options: Any) -> Any:
    """Load a data set through torchvision, downloading it if necessary; other ranks on this machine wait."""
    from torchvision import datasets

    if not hasattr(datasets, name):
        raise UserError(f"this version of torchvision has no {name}; upgrade torchvision")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with best_effort_lock(cache_folder() / f"{name}.lock"):
        return getattr(datasets, name)(str(cache_folder()), download=True, **options)


def _fake(split: str, size: int) -> Split:
    num_images = NUM_FAKE_IMAGES[split]
    labels = array("H", range(NUM_FAKE_CLASSES)) * (num_images // NUM_FAKE_CLASSES + 1)
    return Split(FakeImages(num_images, size), labels[:num_images], [f"fake {n}" for n in range(NUM_FAKE_CLASSES)])


def _small_images(flip: bool) -> Preprocessing:
    """Return the preprocessing for images of about 32 x 32 pixels: no tiny crops; ``flip`` is False for digits."""
    return Preprocessing(32, crop_scale=(0.7, 1.0), resize_ratio=1.0, flip=flip)


NAMED_SETS = {
    "digits": NamedSet(_small_images(flip=False), "", folder=digits_folder),
    "fashion-mnist": NamedSet(_small_images(flip=True), "FashionMNIST/raw (four .gz files)", split=_fashion_mnist),
    "cifar10": NamedSet(_small_images(flip=True), "cifar-10-python.tar.gz", split=partial(_cifar, "CIFAR10")),
    "cifar100": NamedSet(_small_images(flip=True), "cifar-100-python.tar.gz", split=partial(_cifar, "CIFAR100")),
    "imagenette": NamedSet(Preprocessing(), "imagenette2-320.tgz", folder=_imagenette),
    "fake": NamedSet(Preprocessing(), "", split=_fake),
}


@contextlib.contextmanager
def explain_failed_download(name: str) -> Iterator[None]:
    """Turn a failed download into a UserError that says which files to put into the cache folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # no network, a damaged file, a full disk: torchvision can raise almost any exception
        reason = " ".join(str(error).split())[:200]
        archives = NAMED_SETS[name].archives
        raise UserError(
            f"--data-path {name}: cannot be downloaded ({reason}); "
            f"without a network connection, put {archives} into {cache_folder()}"
        ) from None
