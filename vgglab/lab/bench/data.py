"""Measure the speed of data loading against torchvision's reference pipeline in the same run.

    python -m vgglab.bench data --data-path imagenet
    python -m vgglab.bench data --data-path imagenet --json   # the last line of stdout is one JSON object

First, on one core, vgglab and the reference load the same chunks of images, interleaved, from the files to a normalised
float32 batch. The files of a chunk are read once beforehand, so disk reads are not timed. Each chunk gives one pair of
times; the ratio is the median over the pairs. Then the loader is measured as training uses it, with one process and
with one per core.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import replace
from statistics import median
from typing import Any, Iterator, NamedTuple, Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate  # torch 1.10 has it only there
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

from vgglab.data.images import FileImages, Split
from vgglab.data.loader import Batches, BatchReader, Sample, mix_seeds
from vgglab.data.sets import open_sets
from vgglab.data.transform import CHANNEL_MEAN, CHANNEL_STD, normalised
from vgglab.devices import open_device
from vgglab.devices.base import Device
from vgglab.dist import ranks
from vgglab.errors import UserError
from vgglab.settings.config import Request

# Training speed of VGG16 on a card, in images/s: the number published by Enflame, and a round number for a fast card.
CARDS = {"T20 at its published speed": 590.3, "a card of 2400 images/s": 2400.0}


class LoadingResult(NamedTuple):
    """The results, in images per second, with the fields of ``vgglab bench data --json``."""

    images_per_second: float  # vgglab on one core, from the file to the normalised batch
    reference_images_per_second: float  # torchvision's reference on one core
    ratio: float  # median over the pairs of times
    ratio_range: tuple[float, float]
    decode_images_per_second: float  # reading and decoding whole images: the limit of loaders that do so
    num_pairs: int
    by_workers: dict[int, dict[str, float]]  # loader processes -> images_per_second, reference_images_per_second
    decoder: str
    image_size: int
    num_images: int
    num_cores: int
    workers_needed: dict[str, int]  # loader processes needed to keep up with each card


class ReferenceImages(Dataset):
    """The pipeline of torchvision's reference script: Pillow, then RandomResizedCrop and so on, one image at a time."""

    def __init__(self, split: Split, image_size: int) -> None:
        self.split = split
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(image_size),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float),
                transforms.Normalize(CHANNEL_MEAN, CHANNEL_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        images = self.split.images
        is_file = isinstance(images, FileImages)
        picture = pil_loader(images.name(index)) if is_file else images.open(index, "pil").pixels()
        return self.transform(picture), self.split.labels[index]


def measure_loading(
    config: Request, seconds: float, workers: Sequence[int] | None = None, card: float | None = None
) -> LoadingResult:
    """Measure how fast the training images of ``config`` are loaded, compared with torchvision's reference.

    Args:
        config: the settings; only data set, image size, batch size and decoder are used.
        seconds: approximate duration of each part: on one core, and with each number of loader processes.
        workers: numbers of loader processes to measure; None measures two cases: one process, and one per core.
        card: the training speed to keep up with, in images/s; None for all cards in ``CARDS``.

    Raises:
        UserError: as in ``open_sets``; also if an image cannot be read.
    """
    sets = open_sets(replace(config, test_only=False))
    split = sets.train
    assert split is not None
    if sets.is_fake:
        raise UserError("--data-path fake: generated images have no files to read; use a folder or another data set")
    device = open_device("cpu")
    device.open()
    reader = BatchReader(split, sets.train_transform(), sets.image_size, sets.decoder, skips_bad_images=False)
    reference = ReferenceImages(split, sets.image_size)
    size = min(config.batch_size, len(split))
    with _on_one_core():
        chunks = list(_chunks(reader, reference, size, seconds))
    vgglab_seconds, reference_seconds, decode_seconds, num_images = (sum(column) for column in zip(*chunks))
    core_rate = num_images / vgglab_seconds
    counts = sorted({1, ranks.num_cores()}) if workers is None else workers
    by_workers = {}
    for count in counts:
        num_images_needed = core_rate * min(count, ranks.num_cores()) * seconds / 4
        num_batches = max(4, math.ceil(num_images_needed / size))
        by_workers[count] = _rates_with_workers(count, reader, reference, size, num_batches, device)
    ratios = sorted(chunk[1] / chunk[0] for chunk in chunks)
    best = max([rates["images_per_second"] / count for count, rates in by_workers.items()] or [core_rate])
    cards = {f"{card:g} images/s": card} if card else CARDS
    return LoadingResult(
        images_per_second=core_rate,
        reference_images_per_second=num_images / reference_seconds,
        ratio=median(ratios),
        ratio_range=(ratios[0], ratios[-1]),
        decode_images_per_second=num_images / decode_seconds,
        num_pairs=len(chunks),
        by_workers=by_workers,
        decoder=sets.decoder,
        image_size=sets.image_size,
        num_images=len(split),
        num_cores=ranks.num_cores(),
        workers_needed={name: math.ceil(rate / best) for name, rate in cards.items()},
    )


def _chunks(
    reader: BatchReader, reference: ReferenceImages, size: int, seconds: float
) -> Iterator[tuple[float, float, float, int]]:
    """Yield for each chunk the seconds of vgglab, of the reference and of decoding alone, and the number of images."""

    def load_with_vgglab(samples: list[Sample]) -> None:
        normalised(reader[samples].images)

    def load_with_reference(samples: list[Sample]) -> None:
        default_collate([reference[sample.image] for sample in samples])

    def decode(samples: list[Sample]) -> None:
        for sample in samples:
            reader.split.images.open(sample.image, reader.decoder).pixels()

    deadline, number = time.perf_counter() + seconds, 0
    while number < 4 or time.perf_counter() < deadline:
        samples = _samples(number, size, len(reader))
        decode(samples)  # reads the files into the page cache, for both
        order = [load_with_vgglab, load_with_reference]
        timed = {}
        for load in [*order[:: 1 if number % 2 else -1], decode]:
            started = time.perf_counter()
            load(samples)
            timed[load] = time.perf_counter() - started
        if number:  # the first is warm-up
            yield timed[load_with_vgglab], timed[load_with_reference], timed[decode], size
        number += 1


def _samples(number: int, size: int, num_images: int) -> list[Sample]:
    """The images of chunk ``number``, in order; after the last image comes the first one again."""
    indices = [(number * size + offset) % num_images for offset in range(size)]
    return [Sample(index, mix_seeds(number, index)) for index in indices]


def _rates_with_workers(
    count: int, reader: BatchReader, reference: ReferenceImages, size: int, num_batches: int, device: Device
) -> dict[str, float]:
    """Return the images per second of vgglab and of the reference, each with ``count`` loader processes."""
    num_prefetched = 2 * count  # batches loaded ahead, two per process; once they are used up, only loading counts
    samples = [_samples(number, size, len(reader)) for number in range(num_prefetched + num_batches)]
    indices = [[sample.image for sample in batch] for batch in samples]
    loader = DataLoader(reference, batch_sampler=indices, num_workers=count, multiprocessing_context="fork")
    rates, reference_rates = [], []
    for _ in range(2):
        rates.append(_rate(Batches(reader, samples, count, device).epoch(0), num_prefetched, size))
        reference_rates.append(_rate(iter(loader), num_prefetched, size))
    return {"images_per_second": max(rates), "reference_images_per_second": max(reference_rates)}


def _rate(batches: Iterator[Any], num_prefetched: int, size: int) -> float:
    for _ in zip(range(num_prefetched), batches):
        pass
    started = time.perf_counter()
    num_images = sum(size for _ in batches)
    return num_images / (time.perf_counter() - started)


@contextlib.contextmanager
def _on_one_core() -> Iterator[None]:
    """Restrict this process to one thread on one core (on Linux; elsewhere only to one thread)."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def as_text(result: LoadingResult, data_path: str) -> str:
    """Return the results as text."""
    low, high = result.ratio_range
    lines = [
        f"{data_path}: {result.num_images} training images, cropped to {result.image_size}x{result.image_size}, "
        f"decoder {result.decoder}",
        "",
        "one core, images/s           vgglab   torchvision's reference   decoding alone",
        f"{'':22s}{result.images_per_second:13.0f}{result.reference_images_per_second:26.0f}"
        f"{result.decode_images_per_second:17.0f}",
        f"vgglab: {result.ratio:.2f} x the reference's speed (median of {result.num_pairs} pairs, "
        f"{low:.2f} to {high:.2f})",
        "",
        "loader processes, images/s   vgglab   torchvision's reference",
    ]
    for count, rates in result.by_workers.items():
        vgglab_rate, reference_rate = rates["images_per_second"], rates["reference_images_per_second"]
        lines.append(f"{count:22d}{vgglab_rate:13.0f}{reference_rate:26.0f}")
    lines.append("")
    for name, count in result.workers_needed.items():
        note = f"; cores of this machine: {result.num_cores}" if count > result.num_cores else ""
        lines.append(f"{name}: needs {count} loader processes, each on a separate core{note}")
    return "\n".join(lines)
