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


def _parse(line: str, where: str) -> tuple[str, int]:
    path, _, label = line.strip().replace("\t", " ").rpartition(" ")
    path = path.strip()
    is_number = label.isascii() and label.isdigit() and len(label) <= len(str(MAX_LABEL))
    if not path or not is_number or int(label) > MAX_LABEL:
        raise UserError(f"{where}: {line.strip()[:80]!r} is not a path and a label (a whole number, 0 or larger)")
    if path.startswith("/") or ".." in path.split("/"):
        raise UserError(f"{where}: {path!r} points outside the data set; paths are relative to its root")
    return posixpath.normpath(path), int(label)


def classes_of(listed: ListFile) -> list[str]:
    """A name for each label: its folder if folder and label match one to one, otherwise ``label <number>``.

    Raises:
        UserError: the labels are not consecutive from 0, for example because they start at 1.
    """
    used = sorted(set(listed.labels))
    if used[-1] + 1 != len(used):
        missing = next(number for number, label in enumerate([*used, -1]) if number != label)
        raise UserError(
            f"{listed.name}: labels from {used[0]} to {used[-1]}, but {missing} does not occur; "
            "labels count from 0 and must have no gaps"
        )
    names: dict[int, set[str]] = {label: set() for label in used}
    labels: dict[str, set[int]] = {}
    for folder, label in zip(listed.folders(), listed.labels):
        names[label].add(folder)
        labels.setdefault(folder, set()).add(label)
    result = []
    for label in used:
        [*folders] = names[label]
        is_its_own = len(folders) == 1 and folders[0] != "" and len(labels[folders[0]]) == 1
        result.append(folders[0] if is_its_own else f"label {label}")
    return result


def missing_from(listed: ListFile, folder: Path, index: Index) -> set[int]:
    """Indices of listed files that do not exist (a broken link counts as existing)."""
    names: dict[str, set[str]] = {}
    missing = set()
    for number, path in enumerate(listed.paths):
        head, _, name = path.rpartition("/")
        if head in index:
            if head not in names:
                names[head] = set(index[head].split())
            is_there = name in names[head] or _is_no_folder(folder / path)
        else:
            is_there = _is_no_folder(folder / path)
        if not is_there:
            missing.add(number)
    return missing


def _is_no_folder(path: Path) -> bool:
    return os.path.lexists(path) and not path.is_dir()


def disagreements(listed: ListFile, index: Index) -> list[str]:
    """Describe the differences between a list file and the folders, one line each, with counts."""
    lines = []
    num_twice = len(listed.paths) - len(set(listed.paths))
    if num_twice:
        first = next(path for path, count in Counter(listed.paths).items() if count > 1)
        lines.append(f"{listed.name}: duplicate lines: {num_twice}, e.g. {first}")
    listed_in = Counter(path.rpartition("/")[0] for path in set(listed.paths))
    unlisted = {name: len(found.split()) - listed_in[name] for name, found in index.items()}
    num_unlisted = sum(count for count in unlisted.values() if count > 0)
    if num_unlisted:
        first = next(name for name, count in unlisted.items() if count > 0)
        lines.append(f"{listed.name}: does not list {num_unlisted} image files of the folders, e.g. in {first or '.'}/")
    usual: dict[str, Counter] = {}
    for folder, label in zip(listed.folders(), listed.labels):
        if folder:
            usual.setdefault(folder, Counter())[label] += 1
    num_odd = sum(sum(counts.values()) - max(counts.values()) for counts in usual.values())
    if num_odd:
        first = next(folder for folder, counts in usual.items() if len(counts) > 1)
        lines.append(
            f"{listed.name}: {num_odd} of {len(listed.paths)} images have a different label from most of their "
            f"folder's images, e.g. in {first}/; the list is used"
        )
    in_order = {folder: number for number, folder in enumerate(sorted(folder for folder in index if folder))}
    others = [f for f, counts in usual.items() if f in in_order and counts.most_common(1)[0][0] != in_order[f]]
    if others and not num_odd:
        lines.append(
            f"{listed.name}: numbers {len(others)} of {len(usual)} class folders differently from alphabetical order, "
            f"e.g. {others[0]}/; the list is used"
        )
    return lines


def refuse_other_labels(listed: ListFile, classes: list[str], other: str) -> None:
    """Raise an error if a split's labels differ from those of training: its accuracy would be meaningless.

    Args:
        classes: folders of the training images; the index of a folder is its label.
        other: where the labels come from, for the message.

    Raises:
        UserError: a folder has a different label in training, or a label does not occur in training.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    wrong = [
        (path, label, label_of[folder])
        for path, folder, label in zip(listed.paths, listed.folders(), listed.labels)
        if folder in label_of and label_of[folder] != label
    ]
    if wrong:
        path, label, right = wrong[0]
        raise UserError(
            f"{listed.name}: {len(wrong)} of {len(listed.paths)} labels disagree with {other}, "
            f"e.g. {path} has label {label} instead of {right}; use the same labels in both splits"
        )
    too_high = [label for label in listed.labels if label >= len(classes)]
    if too_high:
        raise UserError(
            f"{listed.name}: {len(too_high)} of {len(listed.paths)} labels are too large for the "
            f"{len(classes)} classes of {other}, e.g. {too_high[0]}"
        )
