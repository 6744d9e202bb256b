"""Image decoding: the fast decoder compared with Pillow, and damaged or unusual files of every kind."""

import io
import os
import random
from importlib.util import find_spec

import numpy as np
import PIL
import pytest
import torch
from conftest import CLASSES, NUM_TRAIN, NUM_VAL
from PIL import Image, TiffImagePlugin
from processes import python
from torchvision import transforms
from torchvision.transforms import functional

from vgglab.data.decode import DECODERS, ArrayPicture, JpegPicture, choose_decoder, open_picture
from vgglab.data.transform import (
    CHANNEL_MEAN,
    CHANNEL_STD,
    Box,
    CentreCrop,
    RandomCrop,
    as_tensor,
    crop_to_box,
    normalised,
    random_box,
    resize,
)
from vgglab.errors import BadImage

needs_fast = pytest.mark.skipif(
    find_spec("simplejpeg") is None or choose_decoder("auto") == "pil",
    reason="needs simplejpeg, and a torch that can resize uint8",
)

each_decoder = pytest.mark.parametrize(
    "decoder", [pytest.param(name, marks=[needs_fast] if name == "fast" else []) for name in DECODERS]
)


def photograph(width=500, height=375, mode="RGB"):
    """Smooth shapes and some noise, as in a photograph."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width] / 60
    planes = [128 + 80 * np.sin(x + k) * np.cos(y - k) + rng.normal(0, 12, (height, width)) for k in range(3)]
    return Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype("uint8")).convert(mode)


@pytest.fixture
def jpeg(tmp_path):
    def save(image=None, name="photo.JPEG", **options):
        (image or photograph()).save(tmp_path / name, "JPEG", **{"quality": 90, **options})
        return str(tmp_path / name)

    return save


def test_the_version_of_each_decoder_is_recorded(train, monkeypatch):
    """Another version may give other pixels; env.json had only the versions of simplejpeg and Pillow."""
    monkeypatch.setitem(DECODERS, "new", DECODERS["pil"]._replace(package="pytest"))
    versions = train("--epochs=1").run.env["versions"]
    assert versions["pytest"] == pytest.__version__
    assert versions["pillow"] == PIL.__version__


@needs_fast
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 8}, {"optimize": True}], ids=["", "restart", "opt"])
def test_partially_decoded_rows_match_the_whole_image(jpeg, subsampling, options):
    file = jpeg(subsampling=subsampling, **options)
    whole = as_tensor(open_picture(file, "pil").pixels())
    for rows in (1, 15, 16, 17, 31, 200, 352, 359, 360, 374, 375):
        picture = open_picture(file, "fast")
        assert isinstance(picture, JpegPicture)
        pixels = picture.pixels(rows)
        assert torch.equal(pixels[:rows], whole[:rows]), rows
        assert len(pixels) <= rows + 32


@needs_fast
def test_fast_crops_differ_from_pillow_by_rounding(jpeg):
    file = jpeg()
    differences = []
    for seed in range(40):
        crops = [RandomCrop(224, (0.08, 1.0), True)(open_picture(file, name), seed).int() for name in ("pil", "fast")]
        differences.append((crops[0] - crops[1]).abs())
    held_out = [CentreCrop(224, 256 / 224)(open_picture(file, name)).int() for name in ("pil", "fast")]
    differences.append((held_out[0] - held_out[1]).abs())
    assert max(difference.max() for difference in differences) <= 2
    assert sum((difference > 1).sum() for difference in differences) < 1e-5 * sum(d.numel() for d in differences)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (1000, 230), (40, 60)])
def test_pil_matches_torchvision_bit_for_bit(jpeg, size):
    file = jpeg(photograph(*size))
    with Image.open(file) as image:
        image = image.convert("RGB")
    normalise = transforms.Normalize(CHANNEL_MEAN, CHANNEL_STD)
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalise]
    expected = transforms.Compose(steps)(image)
    ours = CentreCrop(224, 256 / 224)(open_picture(file, "pil"))
    assert torch.equal(normalised(ours[None])[0], expected)
    for seed in range(5):
        rng = random.Random(seed)
        box = random_box(image.height, image.width, (0.08, 1.0), rng)
        is_mirrored = rng.random() < 0.5
        expected = functional.resized_crop(image, *box, [224, 224])
        expected = functional.pil_to_tensor(functional.hflip(expected) if is_mirrored else expected)
        ours = RandomCrop(224, (0.08, 1.0), True)(open_picture(file, "pil"), seed)
        assert torch.equal(ours.permute(2, 0, 1), expected)


def test_crops_have_the_areas_and_aspect_ratios_of_the_paper():
    rng = random.Random(0)
    boxes = [random_box(375, 500, (0.08, 1.0), rng) for _ in range(4000)]
    for top, left, height, width in boxes:
        assert top >= 0
        assert left >= 0
        assert top + height <= 375
        assert left + width <= 500
        assert 0.07 < height * width / (375 * 500) <= 1
        assert 0.72 < width / height < 1.36
    reference, image = transforms.RandomResizedCrop(224), Image.new("L", (500, 375))
    theirs = [reference.get_params(image, reference.scale, reference.ratio) for _ in boxes]
    for column in range(4):
        ours, other = (np.mean([box[column] for box in drawn]) for drawn in (boxes, theirs))
        assert ours == pytest.approx(other, rel=0.06, abs=4)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 1)])
def test_an_image_that_no_crop_fits_gets_a_centre_crop(size):
    width, height = size
    box = random_box(height, width, (0.9, 1.0), random.Random(0))
    assert (box.top + box.height <= height, box.left + box.width <= width) == (True, True)
    assert min(box.height, box.width) == min(size)


@each_decoder
def test_tiny_crops_can_be_enlarged(jpeg, decoder):
    file = jpeg(photograph(40, 30))
    for height, width in ((1, 1), (1, 7), (7, 1), (2, 2)):
        pixels = crop_to_box(open_picture(file, decoder).pixels(), Box(3, 2, height, width))
        assert as_tensor(resize(pixels, 32, 32)).shape == (32, 32, 3)


@each_decoder
def test_pixels_from_memory_have_the_type_of_pixels_from_a_file(jpeg, decoder):
    """Otherwise another library resizes them, and the same image gives other crops in a named data set."""
    from_file = open_picture(jpeg(), decoder).pixels()
    from_memory = ArrayPicture(as_tensor(from_file), decoder).pixels()
    assert type(from_memory) is type(from_file)
    assert torch.equal(as_tensor(from_memory), as_tensor(from_file))


def unreadable_files(folder):
    """Write one unreadable file of each kind; returns the error message for each name."""
    whole = io.BytesIO()
    photograph().save(whole, "JPEG")
    data = whole.getvalue()
    png = io.BytesIO()
    photograph(60, 40).save(png, "PNG")
    (folder / "cut.JPEG").write_bytes(data[: len(data) // 2])
    (folder / "empty.JPEG").write_bytes(b"")
    (folder / "text.JPEG").write_text("not an image at all")
    (folder / "dangling.JPEG").symlink_to(folder / "nowhere.JPEG")
    os.mkfifo(folder / "pipe.JPEG")
    (folder / "half.png").write_bytes(png.getvalue()[: len(png.getvalue()) // 2])
    thumbnail = io.BytesIO()
    photograph(160, 120).save(thumbnail, "JPEG")
    # A camera's file: its header contains a complete thumbnail, and the image itself is cut off after the header.
    app1 = b"Exif\0\0" + thumbnail.getvalue()
    (folder / "thumb.JPEG").write_bytes(
        data[:2] + b"\xff\xe1" + (len(app1) + 2).to_bytes(2, "big") + app1 + data[2:1500]
    )
    (folder / "headless.JPEG").write_bytes(data[300:])
    bomb = bytearray(data)
    offset = bomb.index(b"\xff\xc0") + 5
    bomb[offset : offset + 4] = b"\xff\xdc\xff\xdc"  # 65500 x 65500
    (folder / "bomb.JPEG").write_bytes(bomb)
    return {
        "cut.JPEG": "truncated",
        "thumb.JPEG": "truncated",
        "half.png": "truncated",
        "pipe.JPEG": "not a regular file",
        "empty.JPEG": "not an image",
        "text.JPEG": "not an image",
        "dangling.JPEG": "no such file",
        "headless.JPEG": "not an image",
        "bomb.JPEG": "decompression bomb",
    }


@each_decoder
def test_row_28_an_unreadable_image_is_named_with_the_reason(tmp_path, decoder):
    """The original example said "image file is truncated", but not which of 1.28 million files it was."""
    for name, reason in unreadable_files(tmp_path).items():
        with pytest.raises(BadImage, match=reason) as raised:
            open_picture(str(tmp_path / name), decoder).pixels(10)
        assert str(tmp_path / name) in str(raised.value)
        assert raised.value.file == str(tmp_path / name)


def unusual_files(folder):
    """Write one readable file of each unusual kind; returns the colour of pixel (0, 0) for each name."""
    grey16 = Image.fromarray(np.full((40, 50), 0x8040, dtype="uint16"))
    grey16.save(folder / "sixteen.png")
    turned = Image.new("RGB", (50, 40), (200, 20, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.JPEG", quality=100, subsampling="4:4:4", exif=exif)
    Image.new("CMYK", (50, 40), (0, 255, 255, 0)).save(folder / "cmyk.JPEG", quality=100)
    Image.new("L", (50, 40), 77).save(folder / "grey.JPEG", quality=100)
    Image.new("RGB", (50, 40), (10, 200, 30)).quantize(8).save(folder / "palette.png")
    Image.new("RGBA", (50, 40), (10, 200, 30, 128)).save(folder / "clear.png")
    frames = [Image.new("RGB", (50, 40), colour) for colour in ((9, 9, 200), (0, 0, 0))]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    progressive = Image.new("RGB", (50, 40), (60, 70, 80))
    progressive.save(folder / "progressive.JPEG", quality=100, progressive=True)
    Image.new("RGB", (50, 40), (1, 2, 3)).save(folder / "really_a_png.JPEG", "PNG")
    return {
        "sixteen.png": (128, 128, 128), "turned.JPEG": (200, 20, 20), "cmyk.JPEG": (255, 0, 0), "grey.JPEG": (77,) * 3,
        "palette.png": (10, 200, 30), "clear.png": (10, 200, 30), "moving.webp": (9, 9, 200),
        "progressive.JPEG": (60, 70, 80), "really_a_png.JPEG": (1, 2, 3),
    }  # fmt: skip


@each_decoder
def test_unusual_files_are_decoded_correctly(tmp_path, decoder):
    for name, colour in unusual_files(tmp_path).items():
        picture = open_picture(str(tmp_path / name), decoder)
        assert (picture.height, picture.width) == (40, 50), name  # EXIF orientation is ignored, as in torchvision
        pixels = as_tensor(picture.pixels())
        assert pixels.shape == (40, 50, 3)
        assert pixels[0, 0].tolist() == pytest.approx(colour, abs=3), name


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype="float32")).save(tmp_path / "f.tiff")
    assert TiffImagePlugin  # Pillow can read it
    with pytest.raises(BadImage, match="floating-point"):
        open_picture(str(tmp_path / "f.tiff"), "pil").pixels()


@needs_fast
def test_trailing_bytes_after_a_jpeg_are_ignored(jpeg):
    file = jpeg()
    expected = open_picture(file, "fast").pixels()
    with open(file, "ab") as stream:
        stream.write(b"\0" * 1000)
    assert torch.equal(open_picture(file, "fast").pixels(), expected)
    assert torch.equal(open_picture(file, "fast").pixels(100)[:100], expected[:100])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_counted_and_listed_but_not_replaced(train, images, workers):
    bad = {}
    for name, reason in unreadable_files(images / "train" / "n02").items():
        bad[str(images / "train" / "n02" / name)] = reason
    (images / "val" / "n03" / "empty.png").write_bytes(b"")
    bad[str(images / "val" / "n03" / "empty.png")] = "not an image"
    flags = ("--epochs=2", "--batch-size=6", f"--workers={workers}", "--on-bad-image=skip", "--seed=2")
    result = train(*flags)
    assert result.code == 0
    assert sum("warning: skipped" in line for line in result.out.splitlines()) == 1
    found = result.run.skipped()
    assert set(found) == set(bad)
    assert all(bad[file] in reason for file, reason in found.items())
    assert result.run.report()["num_skipped_images"] == len(bad)
    assert [event["num_images"] for event in result.run.events("eval")] == [3 * NUM_VAL] * 2
    lines = (result.run.path / "log" / "skipped-rank0.jsonl").read_text().splitlines()
    assert len(lines) == len(bad)  # once each, not once an epoch


def test_without_the_flag_the_first_bad_image_ends_the_run_and_is_named(refused, images):
    (images / "train" / "n02" / "empty.JPEG").write_bytes(b"")
    line = refused("--batch-size=6", "--epochs=9", after_start=True)
    assert f"{images / 'train' / 'n02' / 'empty.JPEG'}" in line
    assert "--on-bad-image skip" in line


def test_a_batch_without_readable_images_ends_the_run(refused, images):
    for file in (images / "train").glob("*/*"):
        file.write_bytes(b"")
    assert "all images in a batch are unreadable" in refused("--on-bad-image=skip", after_start=True)


def test_check_names_unreadable_files_and_counts_unusual_ones(images):
    bad, odd = unreadable_files(images / "train" / "n01"), unusual_files(images / "val" / "n02")
    result = python("-m", "vgglab.data", "check", images)
    assert result.returncode == 1
    num_files = 3 * (NUM_TRAIN + NUM_VAL) + len(bad) + len(odd)
    assert f"{num_files} files: {len(bad)} cannot be read" in result.stdout
    for name, reason in bad.items():
        [line] = [line for line in result.stdout.splitlines() if f"/train/n01/{name}:" in line]
        assert reason in line
    for kind in ("grey", "cmyk", "palette", "transparent", "16-bit", "animated", "turned", "misnamed"):
        assert f"{kind} (" in result.stdout, kind


def test_check_of_a_valid_data_set_finds_nothing(images):
    result = python("-m", "vgglab.data", "check", images, "--json", "--workers=1")
    assert result.returncode == 0, result.stderr
    assert '"unreadable": {}' in result.stdout
    assert python("-m", "vgglab.data", "check", images / "nowhere").returncode == 2
    assert len(CLASSES) == 3
