"""Find the images of a named data set or of a folder in ImageNet's layout, and decide how to prepare them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgglab.data import lists
from vgglab.data.decode import choose_decoder
from vgglab.data.images import FakeImages, FileImages, Split
from vgglab.data.index import Index, read_index
from vgglab.data.named import NAMED_SETS, NamedSet, explain_failed_download
from vgglab.data.transform import CROPS, CentreCrop, Preprocessing, no_crop
from vgglab.errors import UserError
from vgglab.settings.config import ORIGINAL_NUM_CLASSES, Request

FOLDER = NamedSet(Preprocessing(), archives="")  # the user's own folder, which needs no function


@dataclass
class DataSets:
    """The training images (``train``; None with --test-only) and the held-out images (``val``) of a run."""

    name: str
    data_path: str  # a named set, or the absolute path of a folder, so that a resumed run finds the same images
    train: Split | None
    val: Split
    num_classes: int
    image_size: int
    preprocessing: Preprocessing
    decoder: str
    crops: str
    warnings: list[str]

    @property
    def is_fake(self) -> bool:
        """Whether the images are random pixels, which makes accuracy and loading speed meaningless."""
        return isinstance(self.val.images, FakeImages)

    def train_transform(self) -> Any:
        """The transform for training images, from ``(picture, seed)`` to ``(image_size, image_size, 3)`` uint8."""
        return no_crop if self.is_fake else CROPS[self.crops](self.image_size, self.preprocessing)

    def eval_transform(self) -> Any:
        """The transform for held-out images: the same signature, but deterministic."""
        return no_crop if self.is_fake else CentreCrop(self.image_size, self.preprocessing.resize_ratio)


def open_sets(config: Request) -> DataSets:
    """Find the images that ``config.data_path`` names and check them against the other flags.

    Raises:
        UserError: a folder is missing or unreadable, a class is empty, classes or labels disagree, listed files do not
            exist, the data set cannot be downloaded, or the decoder is not installed.
    """
    try:
        return _open_sets(config)
    except OSError as error:
        raise UserError(
            f"--data-path {config.data_path}: cannot be read ({error.strerror}: {error.filename})"
        ) from None


def _open_sets(config: Request) -> DataSets:
    name = path = config.data_path
    decoder = choose_decoder(config.decoder)
    warnings: list[str] = []
    source = NAMED_SETS.get(name, FOLDER)  # a named set, even if there is also a folder of that name
    preprocessing = source.preprocessing
    image_size = config.image_size or preprocessing.image_size
    if source.split is not None:
        with explain_failed_download(name):
            train = None if config.test_only else source.split("train", image_size)
            val = source.split("val", image_size)
        for split in (train or val, val):
            if split.classes != val.classes or max(split.labels) >= len(val.classes):
                advice = "if it was downloaded, delete it from the cache"
                raise UserError(f"--data-path {name}: labels and classes disagree; {advice}")
    else:
        if source.folder is None:
            root = _existing_folder(name)
            name, path = root.resolve().name, str(root.absolute())
        else:
            with explain_failed_download(name):
                root = source.folder()
        is_strict = config.on_bad_image == "fail"
        train = None if config.test_only else read_split(root, "train", None, is_strict, warnings)
        classes = _training_classes(root) if train is None else train.classes
        val = read_split(root, "val", classes, is_strict, warnings)
    num_classes = _num_classes(config, len(val.classes), warnings)
    sets = DataSets(name, path, train, val, num_classes, image_size, preprocessing, decoder, config.crops, warnings)
    if sets.is_fake and config.crops != "standard":
        warnings.append(f"--crops has no effect with --data-path {name}: the generated images have the right size")
    return sets


def _existing_folder(data_path: str) -> Path:
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(
            f"--data-path {data_path}: no such folder; use one that contains train/ and val/, or "
            f"the name of a data set: {', '.join(NAMED_SETS)}"
        )
    return root


def _training_classes(root: Path) -> list[str] | None:
    """The training classes, which define the labels even with --test-only; None if there is no training data."""
    listed = lists.read_list(root, "train")
    if listed is not None:
        return lists.class_names(listed)
    if not (root / "train").is_dir():
        return None
    return [name for name in read_index(root / "train") if name]


def read_split(root: Path, split: str, classes: list[str] | None, is_strict: bool, warnings: list[str]) -> Split:
    """Read the images of ``<root>/<split>/`` from ``<split>_list.txt`` if it exists, otherwise from the class folders.

    Args:
        classes: the training classes, whose index is the label; None if this split defines them.
        is_strict: raise an error if the list contains files that do not exist.
        warnings: receives one line for each kind of difference between the list and the folders, with counts.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(
            f"--data-path {root}: has no {split}/ folder; it needs train/ and val/ with one folder per class"
        )
    index = read_index(folder)
    listed = lists.read_list(root, split)
    if listed is None:
        warnings += _folder_warnings(split, index, classes)
        return _folder_split(root, split, index, classes)
    if classes is None:
        classes = lists.class_names(listed)
    else:
        lists.check_labels_agree(listed, classes)
    missing = lists.missing_files(listed, folder, index)
    if missing:
        text = f"{listed.name}: {len(missing)} of {len(listed.paths)} files are missing, e.g. {folder / missing[0]}"
        if is_strict or len(missing) == len(listed.paths):
            raise UserError(f"{text}; fix the list, or skip them with --on-bad-image skip")
        warnings.append(f"{text}; they are skipped")
    warnings += lists.describe_differences(listed, index)
    return Split(FileImages(f"{folder}/{path}" for path in listed.paths), listed.labels, classes)


def _folder_warnings(split: str, index: Index, classes: list[str] | None) -> list[str]:
    """Describe what is ignored or missing in the class folders, one line for each kind, with counts."""
    lines, loose_images = [], index[""].split()
    if loose_images:
        lines.append(f"{split}/: {len(loose_images)} images outside class folders are ignored, e.g. {loose_images[0]}")
    nested = [name for name, listing in index.items() if listing.num_folders]
    if nested:
        lines.append(
            f"{split}/: nested folders in {len(nested)} class folders are ignored, e.g. in {split}/{nested[0]}/"
        )
    missing = [name for name in classes or () if name not in index]
    if missing:
        lines.append(f"{split}/: {len(missing)} of {len(classes or ())} classes have no images, e.g. {missing[0]}")
    return lines


def _folder_split(root: Path, split: str, index: Index, classes: list[str] | None) -> Split:
    class_folders = [name for name in index if name]
    if not class_folders:
        raise UserError(f"--data-path {root}: {split}/ has no class folders")
    classes = class_folders if classes is None else classes
    class_to_label = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in class_folders if name not in class_to_label]
    if unknown:
        raise UserError(
            f"--data-path {root}: {split}/{unknown[0]} is not a class of train/; use the same class folders in both"
        )
    labels, folder = array("i"), root / split
    for name in class_folders:
        num_images = len(index[name].split())
        if not num_images:
            raise UserError(
                f"--data-path {root}: class folder {split}/{name} contains no images; add some or remove it"
            )
        labels.extend([class_to_label[name]] * num_images)
    images = FileImages(f"{folder}/{name}/{image}" for name in class_folders for image in index[name].split())
    return Split(images, labels, classes)


def _num_classes(config: Request, found: int, warnings: list[str]) -> int:
    requested = config.num_classes
    if requested is None or requested == found:
        return found
    if requested == ORIGINAL_NUM_CLASSES and requested > found:
        # The original example's commands all set 1000. Training works with it, but wastes outputs, and the
        # classes are numbered differently from those of ImageNet weights.
        warnings.append(
            f"--num-classes {requested}: the data set has {found} classes; the remaining outputs stay unused"
        )
        return requested
    raise UserError(
        f"--num-classes {requested}: {config.data_path} has {found} classes; leave the flag out or set it to {found}"
    )
