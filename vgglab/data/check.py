"""Check a data set before training: find unreadable and unusual image files.

    python -m vgglab.data check imagenet
    python -m vgglab.data check imagenet --json

Every file is decoded in full, by several processes. Unreadable files are listed by name. Unusual files are counted
by kind, with an example of each. Exit codes: 0 all files can be read, 1 some cannot, 2 bad input.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from PIL import Image

from vgglab.data.decode import SIXTEEN_BIT_MODES, open_picture
from vgglab.data.images import FileImages
from vgglab.data.sets import open_sets
from vgglab.dist.ranks import num_cores
from vgglab.dist.signals import ignore_signals_in_worker
from vgglab.errors import BadImage, UserError
from vgglab.settings.parser import parse_flags

ORIENTATION_TAG = 0x0112  # the EXIF tag
UPRIGHT_VALUE = 1
# The kinds of unusual files that can be read, and how training handles them.
KINDS = {
    "grey": "greyscale; the channel is repeated three times",
    "cmyk": "converted to RGB by Pillow",
    "palette": "converted to RGB; transparency is dropped",
    "transparent": "transparency is dropped",
    "16-bit": "the upper 8 bits are used",
    "animated": "the first frame is used",
    "turned": "the EXIF orientation is ignored, as in torchvision",
    "misnamed": "the file extension does not match the format",
    "odd": "the pixels can be read, but the EXIF metadata cannot",
}
CHUNK_SIZE = 64


class Findings(NamedTuple):
    """The result for a data set; its fields are those of the ``--json`` output."""

    num_files: int
    unreadable: dict[str, str]  # file -> why
    kinds: dict[str, list[str]]  # one of KINDS -> files
    disagreements: list[str]  # differences between the list files and the folders

    def __repr__(self) -> str:
        lines = [f"{self.num_files} files: {len(self.unreadable)} cannot be read"]
        lines += [f"  {_escaped(file)}: {why}" for file, why in self.unreadable.items()]
        for kind, files in self.kinds.items():
            lines.append(f"{kind} ({len(files)}): {KINDS[kind]}; e.g. {_escaped(files[0])}")
        lines += self.disagreements
        if self.unreadable:
            lines.append("repair or remove the unreadable files, or train with --on-bad-image skip")
        return "\n".join(lines)


def check_file(file: str) -> tuple[str, list[str]]:
    """Decode one file in full.

    Returns why it cannot be read (empty if it can), and which of ``KINDS`` apply.
    """
    try:
        open_picture(file, "pil").pixels()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "", _unusual_kinds(file)
    except BadImage as error:
        return error.reason, []
    except Exception:  # the pixels can be read, the metadata cannot
        return "", ["odd"]


def _unusual_kinds(file: str) -> list[str]:
    with Image.open(file) as image:
        orientation = image.getexif().get(ORIENTATION_TAG, UPRIGHT_VALUE)
        is_jpeg_by_name = file.lower().endswith((".jpg", ".jpeg"))
        applies = {
            "grey": image.mode in ("1", "L", "LA"),
            "cmyk": image.mode == "CMYK",
            "palette": image.mode == "P",
            "transparent": image.mode in ("RGBA", "LA", "PA"),
            "16-bit": image.mode in SIXTEEN_BIT_MODES,
            "animated": getattr(image, "n_frames", 1) > 1,
            "turned": orientation not in (0, UPRIGHT_VALUE),
            "misnamed": is_jpeg_by_name != (image.format in ("JPEG", "MPO")),
        }
    return [kind for kind in applies if applies[kind]]


def check_images(data_path: str, workers: int | None = None) -> Findings:
    """Check all training and held-out images of a data set, with a progress bar on stderr, and return the findings.

    Args:
        data_path: a folder or the name of a data set, as in training.
        workers: number of reader processes; None for one per core.

    Raises:
        UserError: as in ``open_sets``; also if the images are not files, or a reader process was killed. An unreadable
            file is not an error; it is listed in the result.
    """
    sets = open_sets(parse_flags([f"--data-path={data_path}", "--on-bad-image=skip"]))
    if not isinstance(sets.val.images, FileImages):
        raise UserError(f"{data_path}: no files to check; its images are held in memory")
    splits = [split for split in (sets.train, sets.val) if split is not None]
    files = [split.images.name(index) for split in splits for index in range(len(split))]
    unreadable: dict[str, str] = {}
    kinds: dict[str, list[str]] = {}
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    pool = ProcessPoolExecutor(workers or num_cores(), mp_context=context, initializer=ignore_signals_in_worker)
    try:
        results = _with_progress_bar(pool.map(check_file, files, chunksize=CHUNK_SIZE), len(files))
        for (error, kinds_of_file), file in zip(results, files):
            if error:
                unreadable[file] = error
            for kind in kinds_of_file:
                kinds.setdefault(kind, []).append(file)
    except BrokenProcessPool:
        raise UserError(
            "a reader process was killed, probably because memory ran out; use fewer processes with -j"
        ) from None
    finally:
        for process in list(pool._processes.values()):  # they ignore termination signals, except from this process
            process.terminate()
        pool.shutdown()  # waits: if it did not, Python 3.8 would close a pipe that its own thread is still reading
    return Findings(len(files), unreadable, kinds, sets.warnings)


def _with_progress_bar(results: Any, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, total=total, unit=" files", dynamic_ncols=True, disable=None)


def _escaped(file: str) -> str:
    return file if file.isprintable() else repr(file)
