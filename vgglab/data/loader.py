"""Batches: which image comes when, and what is done to it.

Both depend on the seed, the epoch and the image's place in the set, and on nothing else: not on the
number of workers, and not on how many ranks share a global batch.
"""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vgglab.config import Config
from vgglab.data.sets import DataSets, Split, eval_transform, train_transform
from vgglab.devices.base import Device
from vgglab.errors import UserError

STRIDE = 1_000_003  # a prime above any number of epochs: seeds of two epochs do not meet
MAX_SEED = 2**63  # what a torch generator takes


class Pick(NamedTuple):
    """One image to load, by its place in the split; ``seed`` is that of its random transforms."""

    image: int
    seed: int


class ImageFiles(Dataset):
    """Decodes and transforms the image files of a split."""

    def __init__(self, split: Split, transform: Any) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, pick: Pick) -> tuple[Tensor, int]:
        file = self.split.files[pick.image]
        try:
            with Image.open(file) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
            raise UserError(f"{file}: cannot be read as an image ({error}); repair or remove it") from None
        # torchvision draws from torch's global generator, which in the main process is also dropout's.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(pick.seed)
            return self.transform(pixels), self.split.labels[pick.image]


class TrainPicks(Sampler):
    """Shuffled batches of one rank; a last batch that is not full on every rank is left out.

    Step k of an epoch takes places ``k x global_batch_size`` and on of one shuffle that all ranks share;
    each rank takes its stretch of them. So one rank with batch 64 and two with 32 see the same images.
    """

    def __init__(self, num_images: int, batch_size: int, device: Device, seed: int) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.rank, self.world_size = device.rank, device.world_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Pick]]:
        epoch_seed = (self.seed * STRIDE + self.epoch) % MAX_SEED
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(epoch_seed)).tolist()
        for step in range(len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [Pick(i, (epoch_seed * STRIDE + i) % MAX_SEED) for i in order[start : start + self.batch_size]]


class EvalPicks(Sampler):
    """Every image once, in order; rank r of n takes images r, r + n, r + 2n, ... and nothing is padded."""

    def __init__(self, num_images: int, batch_size: int, device: Device) -> None:
        self.indices = range(device.rank, num_images, device.world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Pick]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [Pick(i, 0) for i in self.indices[start : start + self.batch_size]]


class Batches:
    """Batches of ``images (N, 3, S, S) float32, labels (N,) int64``; at most ``max_batches`` a pass."""

    def __init__(self, files: ImageFiles, picks: Any, workers: int, max_batches: int, device: Device) -> None:
        self.num_images = len(files)
        self._picks = picks
        self._max_batches = max_batches
        # A generator of its own: drawing the workers' seeds must not move the one that dropout draws from.
        options: dict[str, Any] = {"generator": torch.Generator(), "pin_memory": device.pins_memory}
        if workers:
            options.update(persistent_workers=True, multiprocessing_context=device.worker_start)
        self._loader = DataLoader(files, batch_sampler=picks, num_workers=workers, **options)

    def __len__(self) -> int:
        return len(self._picks) if self._max_batches == -1 else min(len(self._picks), self._max_batches)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one pass.

        Raises:
            UserError: an image that cannot be read, by name.
        """
        self._picks.epoch = epoch
        try:
            for _, batch in zip(range(len(self)), self._loader):
                yield batch
        except UserError as error:
            # From a worker process it arrives with that process's traceback around it.
            last_line = str(error).strip().splitlines()[-1]
            raise UserError(last_line.split("UserError: ", 1)[-1]) from None


def train_batches(sets: DataSets, config: Config, device: Device) -> Batches:
    """Training batches of this rank.

    Raises:
        UserError: the set does not fill one batch on every rank.
    """
    assert sets.train is not None
    picks = TrainPicks(len(sets.train), config.batch_size, device, int(config.seed or 0))
    if len(picks) == 0:
        ranks = f" x {device.world_size} ranks" if device.world_size > 1 else ""
        size = len(sets.train)
        raise UserError(f"--batch-size {config.batch_size}{ranks}: larger than the training set ({size} images)")
    files = ImageFiles(sets.train, train_transform(sets))
    return Batches(files, picks, int(config.workers or 0), config.training_step_per_epoch, device)


def eval_batches(sets: DataSets, config: Config, device: Device) -> Batches:
    """Held-out batches of this rank."""
    picks = EvalPicks(len(sets.val), config.batch_size, device)
    files = ImageFiles(sets.val, eval_transform(sets))
    return Batches(files, picks, int(config.workers or 0), config.eval_step_per_epoch, device)
