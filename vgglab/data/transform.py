"""Transforms from decoded images to the network's input.

The loader crops and resizes each image and mirrors some, with a seed for each image; the result is ``(S, S, 3)`` uint8.
The card then converts the whole batch to float32 and normalises it. By default the crops are those of torchvision's
reference script (``RandomResizedCrop`` in training; ``Resize``, then ``CenterCrop`` in evaluation).
"""

from __future__ import annotations

import functools
import math
import random
from typing import Any, Callable, NamedTuple, Protocol, Union

import torch
from PIL import Image
from torch import Tensor, nn

# Mean and standard deviation of ImageNet's training images per channel (red, green, blue), for values in [0, 1].
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)
ASPECT_RATIOS = (3 / 4, 4 / 3)  # width to height of a random crop
BILINEAR = getattr(Image, "Resampling", Image).BILINEAR  # Pillow 9.1 moved it

Pixels = Union[Tensor, Image.Image]  # (H, W, 3) uint8, or an RGB Pillow image


class AnyPicture(Protocol):
    """An image whose header has been read; its pixels are decoded on request."""

    height: int
    width: int

    def pixels(self, rows: int | None = None) -> Pixels:
        """Decode at least the first ``rows`` rows (default: all) to RGB. Call this only once. Raises BadImage."""


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Preprocessing(NamedTuple):
    """How images are made square.

    ``resize_ratio`` is the length of the shorter side before the centre crop, relative to ``image_size``.
    """

    image_size: int = 224
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area in a random crop; as in torchvision
    flip: bool = True
    resize_ratio: float = 256 / 224


class RandomCrop(NamedTuple):
    """Training: a random part of the image, resized to a square and mirrored with probability 1/2."""

    size: int
    scale: tuple[float, float]
    flip: bool

    def __call__(self, picture: AnyPicture, seed: int) -> Tensor:
        """Return ``(size, size, 3)`` uint8. Raises BadImage."""
        draw = random.Random(seed)
        box = random_box(picture.height, picture.width, self.scale, draw)
        return _cut_out(picture, box, self.size, is_mirrored=self.flip and draw.random() < 0.5)


class JitteredCrop(NamedTuple):
    """The VGG paper's training crop: resize the shorter side to a random length (256 to 512 pixels), crop 224 x 224.

    The position is random, and half of the crops are mirrored. With another ``size``, all numbers scale in proportion.
    Source: Simonyan and Zisserman 2014, section 3.1, "training image size".
    """

    size: int
    flip: bool

    def __call__(self, picture: AnyPicture, seed: int) -> Tensor:
        """Return ``(size, size, 3)`` uint8. Raises BadImage."""
        draw = random.Random(seed)
        height, width = picture.height, picture.width
        # The side of a 224 crop at a shorter side of 256 to 512, in pixels of the original image.
        side = max(1, round(min(height, width) * 224 / draw.uniform(256, 512)))
        box = Box(draw.randint(0, height - side), draw.randint(0, width - side), side, side)
        return _cut_out(picture, box, self.size, is_mirrored=self.flip and draw.random() < 0.5)


def _cut_out(picture: AnyPicture, box: Box, size: int, is_mirrored: bool) -> Tensor:
    pixels = crop_to_box(picture.pixels(box.top + box.height), box)
    square = as_tensor(resize(pixels, size, size))
    return square.flip(1) if is_mirrored else square


class TrivialAugmentCrop(NamedTuple):
    """Training: ``crop``, then one random operation of TrivialAugment, with a random strength (uniform).

    Source: Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", 2021. Computed
    by torchvision on Pillow images, which is faster than on tensors.
    """

    crop: RandomCrop

    def __call__(self, picture: AnyPicture, seed: int) -> Tensor:
        """Return ``(size, size, 3)`` uint8. Raises BadImage."""
        from torchvision.transforms import TrivialAugmentWide

        image = Image.fromarray(self.crop(picture, seed).numpy())
        with torch.random.fork_rng(devices=[]):  # torchvision uses the global generator
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every card, for each image
            return as_tensor(TrivialAugmentWide()(image))


CROPS: dict[str, Callable[[int, Preprocessing], Any]] = {
    "standard": lambda size, preprocessing: RandomCrop(size, preprocessing.crop_scale, preprocessing.flip),
    "scale-jitter": lambda size, preprocessing: JitteredCrop(size, preprocessing.flip),
    "trivial": lambda size, preprocessing: TrivialAugmentCrop(CROPS["standard"](size, preprocessing)),
}


class CentreCrop(NamedTuple):
    """Evaluation: resize the shorter side to ``size x resize_ratio``, then crop the centre. ``seed`` is ignored."""

    size: int
    resize_ratio: float

    def __call__(self, picture: AnyPicture, seed: int = 0) -> Tensor:
        """Return ``(size, size, 3)`` uint8. Raises BadImage."""
        short = round(self.size * self.resize_ratio)
        height, width = picture.height, picture.width
        if height < width:
            height, width = short, int(short * width / height)
        else:
            height, width = int(short * height / width), short
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        centre = Box(top, left, self.size, self.size)
        return as_tensor(crop_to_box(resize(picture.pixels(), height, width), centre))


def no_crop(picture: AnyPicture, seed: int = 0) -> Tensor:
    """Return the whole image, ``(H, W, 3)`` uint8; for images that already have the right size."""
    return as_tensor(picture.pixels())


def random_box(height: int, width: int, scale: tuple[float, float], draw: random.Random) -> Box:
    """Draw a random box whose share of the image's area is in the range ``scale``, with an aspect ratio of 3/4 to 4/3.

    Source: Szegedy et al., "Going Deeper with Convolutions", 2014, section 6; the numbers are torchvision's. If none of
    ten boxes fits into the image, the result is the largest centred box with an allowed aspect ratio.
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for _ in range(10):
        area = height * width * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = draw.randint(0, height - box_height), draw.randint(0, width - box_width)
            return Box(top, left, box_height, box_width)
    narrowest, widest = ASPECT_RATIOS
    box_width = min(width, round(height * widest))
    box_height = min(height, round(width / narrowest))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize bilinearly with antialiasing, as Pillow and torchvision do."""
    if isinstance(pixels, Image.Image):
        return pixels if pixels.size == (width, height) else pixels.resize((width, height), BILINEAR)
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = pixels.permute(2, 0, 1)[None]  # (1, 3, H, W), with the same memory layout
    return nn.functional.interpolate(planes, size=(height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def crop_to_box(pixels: Pixels, box: Box) -> Pixels:
    """Cut ``box`` out of an image."""
    top, left, height, width = box
    if isinstance(pixels, Image.Image):
        return pixels.crop((left, top, left + width, top + height))
    return pixels[top : top + height, left : left + width]


def as_tensor(pixels: Pixels) -> Tensor:
    """Convert pixels to a ``(H, W, 3)`` uint8 tensor."""
    if isinstance(pixels, Tensor):
        return pixels
    flat = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    return flat.view(pixels.height, pixels.width, 3)


def normalised(images: Tensor, channels_last: bool = False) -> Tensor:
    """Normalise with ImageNet's mean and standard deviation: ``(N, S, S, 3)`` uint8 to ``(N, 3, S, S)`` floats.

    The floats have PyTorch's default type, normally float32. With ``channels_last`` they have the channels-last
    (NHWC) memory layout. Rounding is the same as in torchvision's ``ToTensor`` and ``Normalize``.
    """
    dtype = torch.get_default_dtype()
    mean, std = _constants(images.device, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    planes = images.permute(0, 3, 1, 2).to(dtype, memory_format=layout)
    return planes.div_(255).sub_(mean).div_(std)


@functools.lru_cache(maxsize=None)
def _constants(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on the device, copied once: an unpinned copy per step would make the host wait."""
    constants = [torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (CHANNEL_MEAN, CHANNEL_STD)]
    mean, std = (constant.to(device) for constant in constants)
    return mean, std
