"""Decode image files with Pillow, or faster with libjpeg-turbo, which can skip rows that are not needed.

There are two decoders. ``pil`` gives the same pixels as torchvision's reference script, bit for bit. ``fast`` decodes
ordinary JPEGs with libjpeg-turbo (package simplejpeg) and skips the rows below the crop: two bytes of the header hold
the number of rows, and if a smaller number is written there, the decoder stops early. The decoded pixels are the same.
Resizing them with torch instead of Pillow changes values by 1 (of 255), occasionally by 2 (``tests/test_decode.py``).
``fast`` leaves all other files to Pillow.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import warnings
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from vgglab.data.transform import AnyPicture, Pixels
from vgglab.errors import BadImage, UserError

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes for a grey image of more than 8 bits
BASELINE = (0xC0, 0xC1)  # start-of-frame markers of sequential JPEGs with Huffman codes
START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
START_OF_SCAN = 0xDA
END_OF_IMAGE = b"\xff\xd9"
TAIL_BYTES = 4096  # where to look for the end marker: some cameras and editors append data to the image


def choose_decoder(requested: str) -> str:
    """Return the requested decoder; for ``auto``, the first one in ``DECODERS`` that can be used.

    Raises:
        UserError: the requested decoder is not installed.
    """
    if requested == "auto":
        return next(name for name, decoder in DECODERS.items() if not decoder.why_missing())
    missing = DECODERS[requested].why_missing()
    if missing:
        raise UserError(f"--decoder {requested}: {missing}")
    return requested


def _why_no_simplejpeg() -> str:
    try:
        import simplejpeg  # noqa: F401  # it may be installed and not fit this numpy

        # An older torch cannot resize uint8 tensors as Pillow resizes images.
        nn.functional.interpolate(torch.zeros(1, 3, 8, 8).byte(), size=(4, 4), mode="bilinear", antialias=True)
    except (ImportError, TypeError, RuntimeError):
        return (
            "needs the simplejpeg package and torch 2.1 or newer; run pip install simplejpeg, "
            "or leave the flag out to decode with Pillow"
        )
    return ""


@contextlib.contextmanager
def _reading_with_pillow(file: str) -> Iterator[None]:
    """Turn each error in the block into BadImage, and ignore warnings, e.g. about bad EXIF data.

    Pillow warns of a decompression bomb above 89 million pixels and raises above twice that; here both are errors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", module="PIL", category=UserWarning)
            yield
    except Exception as error:  # decoders can raise almost any exception for a damaged file
        raise bad_image(file, reason_of(error)) from None


class Picture:
    """An image file whose header has been read; its pixels are decoded on request."""

    def __init__(self, file: str) -> None:
        """Read the header. Raises BadImage if the file is missing, empty, not an image, or has too many pixels."""
        self.file = file
        with _reading_with_pillow(file):
            self._image = Image.open(file)  # for an animation, the first frame
        self.width, self.height = self._image.size

    def pixels(self, rows: int | None = None) -> Pixels:
        with _reading_with_pillow(self.file), self._image as image:
            return to_rgb(image)


@dataclass
class JpegPicture:
    """An ordinary JPEG in memory: sequential, 8 bits, grey or colour, not truncated."""

    file: str
    data: bytearray
    height: int
    width: int
    height_offset: int  # position of the height in the file, 2 bytes
    block_height: int  # rows that are coded together: 8, or 16 and more with chroma subsampling

    def pixels(self, rows: int | None = None) -> Pixels:
        import simplejpeg

        # A row's colours are interpolated with those of the row below, so at least one more row is decoded.
        block = self.block_height
        num_rows = self.height if rows is None else (rows // block + 1) * block
        if num_rows < self.height:
            struct.pack_into(">H", self.data, self.height_offset, num_rows)
        try:
            # strict=True would report the undecoded rest of the data as an error; Pillow ignores it, too.
            return torch.from_numpy(simplejpeg.decode_jpeg(self.data, strict=False))
        except ValueError:  # an unusual colour space; Pillow supports more
            return Picture(self.file).pixels()


class ArrayPicture:
    """One image, given as an array of pixels."""

    def __init__(self, pixels: Tensor, decoder: str) -> None:
        """``pixels``: (H, W) grey or (H, W, 3), uint8."""
        self.height, self.width = pixels.shape[:2]
        self._pixels, self._decoder = pixels, decoder

    def pixels(self, rows: int | None = None) -> Pixels:
        rgb = self._pixels if self._pixels.dim() == 3 else self._pixels[:, :, None].expand(-1, -1, 3)
        return DECODERS[self._decoder].from_array(rgb.contiguous())


def open_picture(file: str, decoder: str) -> AnyPicture:
    """Open an image file and read its width and height. Raises BadImage, or KeyError for an unknown decoder."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would block
            raise bad_image(file, "not a regular file")
        return DECODERS[decoder].open_file(file)
    except OSError as error:
        raise bad_image(file, reason_of(error)) from None


def _open_jpeg(file: str) -> AnyPicture:
    """Open a file for the decoder ``fast``; anything that is not an ordinary JPEG is left to Pillow."""
    if not file.lower().endswith((".jpeg", ".jpg")):
        return Picture(file)
    with open(file, "rb") as stream:
        data = bytearray(stream.read())
    return _parse_jpeg(file, data) or Picture(file)


class Decoder(NamedTuple):
    """What defines a decoder."""

    package: str  # whose version env.json records, because it may change pixels
    why_missing: Callable[[], str]  # what it needs that is not installed, and what to do; empty if it can be used
    open_file: Callable[[str], AnyPicture]
    from_array: Callable[[Tensor], Pixels]  # converts (H, W, 3) uint8 to what the decoder returns for a file


# In order of preference.
DECODERS = {
    "fast": Decoder("simplejpeg", _why_no_simplejpeg, _open_jpeg, lambda pixels: pixels),
    "pil": Decoder("pillow", lambda: "", Picture, lambda pixels: Image.fromarray(pixels.numpy())),
}


def _parse_jpeg(file: str, data: bytearray) -> JpegPicture | None:
    """Read the header of a complete sequential JPEG; None for other data.

    Source: ITU-T T.81, B.1.1 and B.2.2.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        marker, frame_offset = _next_segment(data, 2, START_OF_FRAME)
        _, scan_offset = _next_segment(data, frame_offset, {START_OF_SCAN})
        # Search after the header only: a thumbnail in it has its own end marker.
        if data.rfind(END_OF_IMAGE, max(scan_offset, len(data) - TAIL_BYTES)) < 0:
            return None
        precision, height, width, num_components = struct.unpack_from(">BHHB", data, frame_offset + 4)
        factors = [data[frame_offset + 10 + 3 * index + 1] & 15 for index in range(num_components)]
    except (IndexError, ValueError, struct.error):
        return None
    is_supported = marker in BASELINE and precision == 8 and num_components in (1, 3) and height and width
    if not is_supported or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
        return None
    return JpegPicture(file, data, height, width, frame_offset + 5, 8 * max(factors))


def _next_segment(data: bytearray, offset: int, markers: set[int]) -> tuple[int, int]:
    """Return the marker and the offset of the first segment, from ``offset`` on, that has one of ``markers``.

    Raises ValueError if a marker is missing.
    """
    while True:
        if data[offset] != 0xFF:
            raise ValueError("a marker is missing")
        marker = data[offset + 1]
        if marker in markers:
            return marker, offset
        offset += 1 if marker == 0xFF else 2 + (data[offset + 2] << 8 | data[offset + 3])  # a second 0xFF is padding


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as Pillow does, except that 16-bit greyscale is scaled to 8 bits instead of clipped."""
    if image.mode in SIXTEEN_BIT_MODES:
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "F":
        raise ValueError("floating-point pixels with an unknown value range")
    return image.convert("RGB")


def bad_image(file: str, reason: str) -> BadImage:
    """Return the exception for an unreadable file, with advice for the user."""
    advice = "repair or remove it, or skip such files with --on-bad-image skip"
    return BadImage(f"{file!r} cannot be read as an image ({reason}); {advice}", file, reason)


def reason_of(error: Exception) -> str:
    """Why a file could not be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {Image.MAX_IMAGE_PIXELS or 0} pixels, possibly a decompression bomb"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__
