"""Read the list files ``train_list.txt`` and ``val_list.txt``, whose lines ``path label`` define a data set.

The path is relative to the root or to the split's folder and may contain spaces; labels start at 0. If a list file
exists, it takes precedence over the class folders, and differences between the two are counted and reported.
"""

from __future__ import annotations

import os
import posixpath
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from vgglab.data.index import Index
from vgglab.errors import UserError

MAX_LABEL = 100_000


class ListFile(NamedTuple):
    """The lines of a list file; paths are relative to the split's folder."""

    name: str
    paths: list[str]
    labels: array

    def folders(self) -> list[str]:
        """The first folder of each path; empty for an image outside any folder."""
        return [path.partition("/")[0] if "/" in path else "" for path in self.paths]


def read_list(root: Path, split: str) -> ListFile | None:
    """Read the list file of a split; return None if there is none.

    Raises:
        UserError: a line is not a path and a label, or points outside the data set; or the list is empty.
    """
    file = root / f"{split}_list.txt"
    if not os.path.lexists(file):
        return None
    if not file.is_file():
        raise UserError(f"{file}: not a regular file; fix it, or remove it to take the labels from the folders")
    result = ListFile(file.name, [], array("i"))
    prefix = "" if (root / split / split).is_dir() else f"{split}/"
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            path, label = _parse(line, f"{file}, line {number}")
            if prefix and path.startswith(prefix):
                path = path[len(prefix) :]
            result.paths.append(path)
            result.labels.append(label)
    if not result.paths:
        raise UserError(f"{file}: is empty; remove it to take the labels from the folders")
    return result


def _parse(line: str, location: str) -> tuple[str, int]:
    path, _, label = line.strip().replace("\t", " ").rpartition(" ")
    path = path.strip()
    is_number = label.isascii() and label.isdigit() and len(label) <= len(str(MAX_LABEL))
    if not path or not is_number or int(label) > MAX_LABEL:
        raise UserError(f"{location}: {line.strip()[:80]!r} is not a path and a label (whole number, 0 to {MAX_LABEL})")
    if path.startswith("/") or ".." in path.split("/"):
        raise UserError(f"{location}: {path!r} points outside the data set; paths are relative to its root")
    return posixpath.normpath(path), int(label)


def class_names(listed: ListFile) -> list[str]:
    """A name for each label: its folder if folder and label match one to one, otherwise ``label <number>``.

    Raises:
        UserError: the labels are not consecutive from 0, for example because they start at 1.
    """
    used_labels = sorted(set(listed.labels))
    unused_labels = set(range(used_labels[-1])) - set(used_labels)
    if unused_labels:
        raise UserError(
            f"{listed.name}: the labels range from {used_labels[0]} to {used_labels[-1]} and do not "
            f"include {min(unused_labels)}; labels must start at 0 and have no gaps"
        )
    pairs = set(zip(listed.folders(), listed.labels))
    labels_of_folder = Counter(folder for folder, _ in pairs)
    folders_of_label = Counter(label for _, label in pairs)
    names = {}
    for folder, label in pairs:
        if folder and labels_of_folder[folder] == folders_of_label[label] == 1:
            names[label] = folder
    return [names.get(label, f"label {label}") for label in used_labels]


def missing_files(listed: ListFile, folder: Path, index: Index) -> list[str]:
    """The listed paths that do not exist (a broken link counts as existing)."""
    names = {parent: set(listing.split()) for parent, listing in index.items()}
    missing = []
    for path in listed.paths:
        parent, _, name = path.rpartition("/")
        if name not in names.get(parent, ()) and not _exists_as_file(folder / path):
            missing.append(path)
    return missing


def _exists_as_file(path: Path) -> bool:
    return os.path.lexists(path) and not path.is_dir()


def describe_differences(listed: ListFile, index: Index) -> list[str]:
    """Describe the differences between a list file and the folders, one line for each kind, with counts."""
    lines = []
    counts = Counter(listed.paths)
    num_duplicates = len(listed.paths) - len(counts)
    if num_duplicates:
        first = next(path for path, count in counts.items() if count > 1)
        lines.append(f"{listed.name}: duplicate lines: {num_duplicates}, e.g. {first}")
    found = Counter({parent: len(listing.split()) for parent, listing in index.items()})
    # A difference of counters contains only the counts above 0.
    unlisted = found - Counter(path.rpartition("/")[0] for path in counts)
    if unlisted:
        num_unlisted, first = sum(unlisted.values()), next(iter(unlisted))
        lines.append(f"{listed.name}: {num_unlisted} image files are not listed, e.g. in {first or '.'}/")
    label_counts: dict[str, Counter] = {}
    for folder, label in zip(listed.folders(), listed.labels):
        if folder:
            label_counts.setdefault(folder, Counter())[label] += 1
    num_differing = sum(sum(counts.values()) - max(counts.values()) for counts in label_counts.values())
    if num_differing:
        first = next(folder for folder, counts in label_counts.items() if len(counts) > 1)
        lines.append(
            f"{listed.name}: {num_differing} of {len(listed.paths)} images have a different label from most images in "
            f"their folder, e.g. in {first}/; the labels in the list are used"
        )
    alphabetical = {folder: number for number, folder in enumerate(index)}
    renumbered = [
        folder
        for folder, labels in label_counts.items()
        if folder in alphabetical and alphabetical[folder] not in labels
    ]
    if renumbered and not num_differing:
        lines.append(
            f"{listed.name}: the labels of {len(renumbered)} of {len(label_counts)} class folders do not follow "
            f"alphabetical order, e.g. {renumbered[0]}/; the labels in the list are used"
        )
    return lines


def check_labels_agree(listed: ListFile, classes: list[str]) -> None:
    """Raise an error if a split's labels contradict the training labels; its accuracy would be meaningless.

    Args:
        classes: folders of the training images; the index of a folder is its label.

    Raises:
        UserError: a folder has a different label in training, or a label does not occur in training.
    """
    class_to_label = {name: label for label, name in enumerate(classes)}
    mismatches = [
        (path, label, class_to_label[folder])
        for path, folder, label in zip(listed.paths, listed.folders(), listed.labels)
        if folder in class_to_label and class_to_label[folder] != label
    ]
    if mismatches:
        path, label, expected = mismatches[0]
        raise UserError(
            f"{listed.name}: {len(mismatches)} of {len(listed.paths)} labels differ from those of the training images, "
            f"e.g. {path} has label {label} instead of {expected}; use the same labels in both splits"
        )
    too_large = [label for label in listed.labels if label >= len(classes)]
    if too_large:
        raise UserError(
            f"{listed.name}: {len(too_large)} of {len(listed.paths)} labels are too large for the "
            f"{len(classes)} classes of the training images, e.g. {too_large[0]}"
        )
