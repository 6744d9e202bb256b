"""Which images there are: a named set or a folder in ImageNet's layout, and how its images are prepared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchvision import transforms

from vgglab.config import SEED_NUM_CLASSES, Config
from vgglab.data.digits import digits_folder
from vgglab.errors import UserError

# Mean and standard deviation of ImageNet's training images per channel (red, green, blue), of values in [0, 1].
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Preparation(NamedTuple):
    """How a set's images become squares. ``resize_ratio`` is ImageNet's 256/224: shrink, then cut the centre."""

    image_size: int = 224
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop; torchvision's default
    flip: bool = True
    resize_ratio: float = 256 / 224


# A mirrored 2 is no digit, and a crop of a twelfth of one cannot be told from another.
NAMED_SETS = {"digits": (digits_folder, Preparation(32, crop_scale=(0.7, 1.0), flip=False, resize_ratio=1.0))}


@dataclass
class Split:
    """Image files with their labels (index into ``classes``)."""

    files: list[str]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class DataSets:
    """What a run learns from (``train``, ``None`` with --test-only) and is tested on (``val``)."""

    name: str
    train: Split | None
    val: Split
    num_classes: int
    image_size: int
    preparation: Preparation
    warnings: list[str]


def open_sets(config: Config) -> DataSets:
    """Find the images that ``config.data_path`` names and check them against the other flags.

    Raises:
        UserError: a missing or unreadable folder, an empty class, classes that disagree.
    """
    try:
        return _open_sets(config)
    except OSError as error:
        raise UserError(
            f"--data-path {config.data_path}: cannot be read ({error.strerror}: {error.filename})"
        ) from None


def _open_sets(config: Config) -> DataSets:
    name, root, preparation = _locate(config.data_path)
    train = None if config.test_only else read_split(root, "train")
    val = read_split(root, "val", classes=train.classes if train else _class_names(root))
    num_classes, warnings = _num_classes(config, val.classes)
    image_size = config.image_size or preparation.image_size
    return DataSets(name, train, val, num_classes, image_size, preparation, warnings)


def _locate(data_path: str) -> tuple[str, Path, Preparation]:
    if data_path in NAMED_SETS:
        write, preparation = NAMED_SETS[data_path]
        return data_path, write(), preparation
    root = Path(data_path)
    if not root.is_dir():
        names = ", ".join(NAMED_SETS)
        raise UserError(
            f"--data-path {data_path}: no such folder; name one with train/ and val/ in it or a bundled set ({names})"
        )
    return root.resolve().name, root, Preparation()


def _class_names(root: Path) -> list[str] | None:
    """The training classes, if they are there: they decide which label a class has."""
    return _class_folders(root / "train") if (root / "train").is_dir() else None


def _class_folders(folder: Path) -> list[str]:
    for entry in os.scandir(folder):
        if entry.is_symlink() and not Path(entry.path).exists():
            raise UserError(f"--data-path: {entry.path} is a link to nowhere; repair or remove it")
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def read_split(root: Path, split: str, classes: list[str] | None = None) -> Split:
    """``<root>/<split>/<class>/<image>``, classes and files in sorted order, hidden ones left out.

    Args:
        classes: the class names whose position is the label; default: the split's own folders.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"--data-path {root}: has no {split}/ folder; it needs train/ and val/ with a folder per class")
    found = _class_folders(folder)
    if not found:
        raise UserError(f"--data-path {root}: {split}/ has no class folders")
    classes = found if classes is None else classes
    label_of = {name: label for label, name in enumerate(classes)}
    strangers = [name for name in found if name not in label_of]
    if strangers:
        raise UserError(
            f"--data-path {root}: {split}/{strangers[0]} is not a class of train/; use the same names in both"
        )
    result = Split([], [], classes)
    for name in found:
        files = sorted(_image_files(folder / name))
        if not files:
            raise UserError(f"--data-path {root}: class folder {split}/{name} holds no images; fill it or remove it")
        result.files += files
        result.labels += [label_of[name]] * len(files)
    return result


def _image_files(folder: Path) -> list[str]:
    return [
        entry.path
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
    ]


def _num_classes(config: Config, classes: list[str]) -> tuple[int, list[str]]:
    found, asked = len(classes), config.num_classes
    if asked is None or asked == found:
        return found, []
    if asked == SEED_NUM_CLASSES and asked > found:
        # The seed kit's commands all say 1000. That trains; it wastes outputs, and weights for
        # ImageNet's 1000 classes number them otherwise.
        return asked, [f"--num-classes {asked}: the folder has {found} classes; the other outputs stay unused"]
    raise UserError(f"--num-classes {asked}: {config.data_path} has {found} classes; leave the flag out or say {found}")


def train_transform(sets: DataSets) -> Any:
    """Random crop, perhaps mirrored, normalised: ``(3, image_size, image_size)`` float32."""
    crop = transforms.RandomResizedCrop(sets.image_size, scale=sets.preparation.crop_scale)
    flip = [transforms.RandomHorizontalFlip()] if sets.preparation.flip else []
    return transforms.Compose([crop, *flip, *_to_normalised_tensor()])


def eval_transform(sets: DataSets) -> Any:
    """Shrunk, centre cut out, normalised: ``(3, image_size, image_size)`` float32. Nothing random."""
    resized = round(sets.image_size * sets.preparation.resize_ratio)
    return transforms.Compose(
        [transforms.Resize(resized), transforms.CenterCrop(sets.image_size), *_to_normalised_tensor()]
    )


def _to_normalised_tensor() -> list[Any]:
    return [transforms.ToTensor(), transforms.Normalize(CHANNEL_MEAN, CHANNEL_STD)]
