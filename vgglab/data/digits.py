"""The bundled data set: scikit-learn's 1797 handwritten digits, as a folder of image files.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998: 8x8 pixels with
17 grey levels. On first use the images are enlarged to 32x32 and written in ImageNet's folder layout, so that training
on them runs the same code as training on ImageNet.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from vgglab.errors import UserError
from vgglab.storage.cache import cache_folder

NAME = "digits-1"  # increment the number when the written files change
HELD_OUT_EVERY = 5
IMAGE_SIZE = 32


def digits_folder() -> Path:
    """Return the folder with ``train/``, ``val/`` and the two list files; it is written on first use.

    Raises:
        UserError: scikit-learn is missing, or the cache cannot be written.
    """
    folder = cache_folder() / NAME
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{NAME}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"--data-path digits: cannot write {folder} ({error.strerror}); set VGGLAB_CACHE to a writable folder"
        ) from None
    try:
        _write_images(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)  # atomic, even if several ranks start at once
    except OSError:
        if not folder.is_dir():  # if it is, another process has written the same images first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_images(folder: Path) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("--data-path digits: needs scikit-learn; run pip install scikit-learn") from None
    from PIL import Image

    bicubic = getattr(Image, "Resampling", Image).BICUBIC  # Pillow 9.1 moved it
    digits = load_digits()
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        # Held-out images are taken from the whole data set, so that both splits are similar.
        split = "val" if index % HELD_OUT_EVERY == 0 else "train"
        file = f"{label}/{index:04d}.png"
        scaled = (pixels * (255 / 16)).round().astype("uint8")  # (8, 8), 0 to 16 becomes 0 to 255
        path = folder / split / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scaled).resize((IMAGE_SIZE, IMAGE_SIZE), bicubic).save(path)
        lines[split].append(f"{file} {label}\n")
    for split, split_lines in lines.items():
        (folder / f"{split}_list.txt").write_text("".join(split_lines))
