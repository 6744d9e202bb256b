"""What training minimises: the cross entropy, of single images or of blends of two, with the target spread a little."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vgglab.config import Config
from vgglab.devices.base import Device


class Targets(NamedTuple):
    """What the network should say of each image of a batch."""

    labels: Tensor  # (N,)
    others: Tensor | None = None  # (N,), of the images that were blended in
    share: Tensor | None = None  # of the first label, 0 to 1; one number on the device


class Objective(nn.Module):
    """Mixup, cutmix and label smoothing, where they are asked for; else the plain cross entropy.

    Mixup adds two images pixel by pixel (Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization"), cutmix
    pastes a rectangle of one into the other (Yun et al. 2019, "CutMix"). The share of each is drawn from Beta(alpha,
    alpha), one for the whole batch; an image's partner is its neighbour in the batch, which is shuffled.
    """

    def __init__(self, config: Config, device: Device) -> None:
        super().__init__()
        self.mixup, self.cutmix, self._device = config.mixup, config.cutmix, device
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def blend(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        """``images (N, 3, S, S)`` as they are, or blended; draws from ``random``, which each step seeds."""
        ways = [(self.mixup, constant_mask), (self.cutmix, box_mask)]
        wanted = [(alpha, mask_of) for alpha, mask_of in ways if alpha > 0]
        if not wanted:
            return images, Targets(labels)
        alpha, mask_of = random.choice(wanted)
        mask = mask_of(random.betavariate(alpha, alpha), images.shape[-1])
        mask = self._device.move(mask, labels[:1])[0].to(images.dtype)  # (1, 1, S, S): 1 where the first image is
        blended = images * mask + images.roll(1, 0) * (1 - mask)
        return blended, Targets(labels, labels.roll(1, 0), mask.mean())

    def forward(self, logits: Tensor, targets: Targets) -> Tensor:
        """The mean over the batch, of ``logits (N, num_classes)``."""
        if targets.others is None:
            return self.cross_entropy(logits, targets.labels)
        first, second = (self.cross_entropy(logits, labels) for labels in (targets.labels, targets.others))
        return targets.share * first + (1 - targets.share) * second  # type: ignore[operator]


def constant_mask(share: float, size: int) -> Tensor:
    """``(1, 1, size, size)``, ``share`` everywhere."""
    return torch.full((1, 1, size, size), share)


def box_mask(share: float, size: int) -> Tensor:
    """``(1, 1, size, size)``: 0 in a rectangle about 1 - ``share`` large, less where it juts out; 1 around it."""
    side = size * math.sqrt(1 - share)
    middle_y, middle_x = random.uniform(0, size), random.uniform(0, size)
    top, bottom = (min(size, max(0, round(middle_y + half))) for half in (-side / 2, side / 2))
    left, right = (min(size, max(0, round(middle_x + half))) for half in (-side / 2, side / 2))
    mask = torch.ones(1, 1, size, size)
    mask[:, :, top:bottom, left:right] = 0
    return mask
