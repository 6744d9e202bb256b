"""The image sources of a split: files, arrays in memory, or generated images (``fake``).

Each source has a length, a name for each image (used in messages), and a method that opens an image for a transform.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from typing import Iterable, Sequence

import torch
from torch import Tensor

from vgglab.data.decode import ArrayPicture, open_picture
from vgglab.data.transform import AnyPicture


class FileImages:
    """Image files on disk; their paths are stored in two flat buffers.

    A list of a million strings has a million reference counts. Reading a string in a forked worker
    changes its count, which copies the whole memory page; with a list, memory use would therefore
    grow throughout the epoch.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        for path in paths:
            self._bytes += os.fsencode(path)
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        """The name of an image in messages: its file, or its position in a named set."""
        index = range(len(self))[index]  # raises IndexError, resolves negative indices
        return os.fsdecode(bytes(self._bytes[self._ends[index] : self._ends[index + 1]]))

    def open(self, index: int, decoder: str) -> AnyPicture:
        """Open an image; its pixels are decoded later. Raises BadImage if it cannot be read."""
        return open_picture(self.name(index), decoder)


class ArrayImages:
    """A small data set held in memory: ``(N, H, W)`` grey or ``(N, H, W, 3)``, uint8."""

    def __init__(self, pixels: Tensor, set_name: str) -> None:
        self.pixels, self.set_name = pixels, set_name

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{self.set_name} {index}"

    def open(self, index: int, decoder: str) -> AnyPicture:
        return ArrayPicture(self.pixels[index], decoder)


class FakeImages(ArrayImages):
    """Random images, generated once and reused, so that loading takes almost no time and does not limit a benchmark."""

    NUM_DISTINCT = 64

    def __init__(self, num_images: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (self.NUM_DISTINCT, size, size, 3)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        super().__init__(pixels, "fake")
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images

    def open(self, index: int, decoder: str) -> AnyPicture:
        return super().open(index % self.NUM_DISTINCT, "fast")


@dataclass
class Split:
    """Images with their labels (indices into ``classes``)."""

    images: FileImages | ArrayImages
    labels: Sequence[int] | array
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)
