"""Make batches: choose the order of the images, load them and transform them.

Order and random transforms depend only on the seed, the epoch and the image's index in the data set, not on the number
of workers or on the number of ranks that share a global batch.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Callable, Iterator, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vgglab.dist.signals import block_signals_during_start, ignore_signals_in_worker
from vgglab.errors import BadImage, UserError

if TYPE_CHECKING:
    from vgglab.data.images import Split
    from vgglab.data.sets import DataSets
    from vgglab.devices.base import Device
    from vgglab.settings.config import Settings

OnSkipped = Callable[[str, str], None]
MULTIPLIER = 1_000_000_007  # a prime larger than any number of images or epochs


def mix_seeds(*parts: int) -> int:
    """Combine several numbers into one seed for a random number generator; changing any of them changes the seed."""
    seed = 0
    for part in parts:
        seed = (seed * MULTIPLIER + part) % 2**63
    return seed


class Sample(NamedTuple):
    """An image to load, given by its index in the split; ``seed`` seeds its random transforms."""

    image: int
    seed: int


class Batch(NamedTuple):
    """A batch from a worker, with pixels as uint8: a quarter of the size of float32."""

    images: Tensor  # (N, S, S, 3) uint8
    labels: Tensor  # (N,) int64
    indices: tuple[int, ...]  # of the images in their split
    skipped: tuple[tuple[str, str], ...]  # (image, reason) of each skipped image


class BatchReader(Dataset):
    """Reads and transforms a whole batch at a time."""

    def __init__(self, split: Split, transform: Any, size: int, decoder: str, skips_bad_images: bool) -> None:
        self.split, self.transform, self.size = split, transform, size
        self.decoder, self.skips_bad_images = decoder, skips_bad_images

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, samples: list[Sample]) -> Batch:
        """Load one batch. Raises BadImage for an unreadable image, unless such images are skipped."""
        images = torch.empty(len(samples), self.size, self.size, 3, dtype=torch.uint8)
        indices: list[int] = []
        skipped = []
        for index, seed in samples:
            try:
                picture = self.split.images.open(index, self.decoder)
                images[len(indices)] = self.transform(picture, seed)
            except BadImage as error:
                if not self.skips_bad_images:
                    raise
                skipped.append((error.file, error.reason))
            else:
                indices.append(index)
        labels = torch.tensor([self.split.labels[index] for index in indices], dtype=torch.int64)
        return Batch(images[: len(indices)], labels, tuple(indices), tuple(skipped))


class TrainBatchSampler(Sampler):
    """Shuffled batches for one rank; the last batch is dropped unless it is full on every rank.

    All ranks share one permutation of the images. Step k of an epoch takes ``global_batch_size`` images from it,
    starting at index ``k x global_batch_size``; the device's sampler distributes them over the ranks. So one rank with
    batch size 64 and two ranks with batch size 32 use the same images in each step.
    """

    epoch = 0
    first = 0  # batches of this epoch that were completed before a resume

    def __init__(self, num_images: int, batch_size: int, device: Device, seed: int, max_batches: int = -1) -> None:
        num_batches = num_images // (batch_size * device.world_size)
        self.num_batches = num_batches if max_batches == -1 else min(num_batches, max_batches)
        self.num_images = num_images
        self.batch_size = batch_size
        indices, num_ranks = range(num_images), device.world_size
        self.sampler = device.sampler(indices, num_replicas=num_ranks, rank=device.rank, shuffle=False)
        self.seed = seed

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch_seed = mix_seeds(self.seed, self.epoch)
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(epoch_seed))
        self.sampler.set_epoch(self.epoch)
        order = order[torch.tensor(list(self.sampler))]  # a tensor: a list of ImageNet's indices would take 50 MB
        for start in range(self.first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size].tolist()
            yield [Sample(image, mix_seeds(epoch_seed, image)) for image in batch]


def eval_sample_batches(num_images: int, batch_size: int, device: Device, max_batches: int = -1) -> list[list[Sample]]:
    """Batches with every image once, in order; rank r of n takes images r, r + n, r + 2n, ... without padding.

    With ``max_batches``, each rank takes at most that many batches. Their images are spread evenly over the data set,
    because its first images all belong to one class.
    """
    num_requested = num_images if max_batches == -1 else max_batches * batch_size * device.world_size
    num_selected = min(num_images, num_requested)
    indices = range(device.rank, num_selected, device.world_size)
    samples = [Sample(index * num_images // num_selected, seed=0) for index in indices]
    return [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress torch's warning about the number of workers; the parser gives a shorter one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Batches:
    """The batches of one rank; ``len()`` is their number in one pass."""

    def __init__(
        self, reader: BatchReader, sampler: TrainBatchSampler | list[list[Sample]], workers: int, device: Device
    ) -> None:
        """``sampler``: the batches of one pass as a list; in training, a sampler whose batches differ in each epoch."""
        self._sampler = sampler
        # A separate generator: drawing the workers' seeds must not change the random numbers of dropout.
        options: dict[str, Any] = {"generator": torch.Generator(), "pin_memory": device.pins_memory}
        if workers:
            # Workers for held-out images exit after each pass: kept idle, they would double the number of processes.
            is_training = isinstance(sampler, TrainBatchSampler)
            options.update(persistent_workers=is_training, multiprocessing_context=device.worker_start)
            options.update(worker_init_fn=ignore_signals_in_worker)
        with _without_warnings():
            # The sampler yields whole batches; batch_size=None passes them on unchanged.
            self._loader = DataLoader(
                reader, sampler=sampler, batch_size=None, collate_fn=_identity, num_workers=workers, **options
            )

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, first: int = 0, on_skipped: OnSkipped | None = None) -> Iterator[Batch]:
        """Yield the batches of one pass, starting with batch ``first``.

        Args:
            on_skipped: called with the name of each skipped image and the reason.

        Raises:
            UserError: an image cannot be read, or, with ``--on-bad-image skip``, no image of a training batch can.
        """
        if isinstance(self._sampler, TrainBatchSampler):
            self._sampler.epoch, self._sampler.first = epoch, first
        with block_signals_during_start(), _without_warnings():
            batches = iter(self._loader)
        try:
            for batch in batches:
                for image, reason in batch.skipped:
                    if on_skipped is not None:
                        on_skipped(image, reason)
                if batch.indices:
                    yield batch
                elif isinstance(self._sampler, TrainBatchSampler):  # the other ranks would wait for this rank's step
                    raise UserError(
                        f"--on-bad-image skip: all images in a batch are unreadable, e.g. {batch.skipped[0][0]!r}; "
                        "increase --batch-size, or find the unreadable images with vgglab data check"
                    )
        except UserError as error:
            # An error in a worker arrives inside that worker's traceback; only its last line is kept.
            last_line = str(error).strip().splitlines()[-1]
            raise UserError(last_line.split(f"{type(error).__name__}: ", 1)[-1]) from None


def _identity(batch: Any) -> Any:
    return batch


def train_batches(sets: DataSets, config: Settings, device: Device) -> Batches:
    """The training batches of this rank.

    Raises:
        UserError: the data set is smaller than one global batch.
    """
    assert sets.train is not None
    num_images, max_batches = len(sets.train), config.training_step_per_epoch
    sampler = TrainBatchSampler(num_images, config.batch_size, device, config.seed, max_batches)
    if len(sampler) == 0:
        ranks = f" x {device.world_size} ranks" if device.world_size > 1 else ""
        raise UserError(f"--batch-size {config.batch_size}{ranks}: larger than the training set ({num_images} images)")
    reader = _reader(sets.train, sets.train_transform(), sets, config)
    return Batches(reader, sampler, config.workers, device)


def eval_batches(sets: DataSets, config: Settings, device: Device) -> Batches:
    """The held-out batches of this rank."""
    batches = eval_sample_batches(len(sets.val), config.batch_size, device, config.eval_step_per_epoch)
    return Batches(_reader(sets.val, sets.eval_transform(), sets, config), batches, config.workers, device)


def _reader(split: Split, transform: Any, sets: DataSets, config: Settings) -> BatchReader:
    return BatchReader(split, transform, sets.image_size, sets.decoder, config.on_bad_image == "skip")
