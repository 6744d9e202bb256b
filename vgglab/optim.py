"""The optimizer, the loss with mixup and cutmix, and averaged weights."""

from __future__ import annotations

import copy
import math
import random
from typing import TYPE_CHECKING, Any, Iterable, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer, RMSprop

from vgglab.devices.compat import without_compiler

if TYPE_CHECKING:
    from vgglab.devices.base import Device
    from vgglab.settings.config import Request, Settings


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class OptimizerKind(NamedTuple):
    """An optimizer that can be chosen."""

    optimizer: type[Optimizer]
    options: dict[str, str]  # arguments besides learning rate and weight decay: the settings they come from
    num_averages: int = 0  # kept for each weight, besides momentum
    can_fuse: bool = False  # make its step in one kernel

    def num_kept(self, config: Request) -> int:
        """Tensors as large as the weights that it keeps, and a checkpoint with it."""
        return self.num_averages + int("momentum" in self.options and config.momentum > 0)


OPTIMIZERS = {
    "sgd": OptimizerKind(SGD, {"momentum": "momentum", "nesterov": "nesterov"}, can_fuse=True),
    "rmsprop": OptimizerKind(RMSprop, {"momentum": "momentum", "alpha": "rmsprop_alpha", "eps": "rmsprop_eps"}, 1),
}


def build_optimizer(config: Settings, model: nn.Module, fused: bool = False) -> Optimizer:
    """Weights and biases decay, batch norm does not unless asked for, biases not if asked.

    ``fused``: the step is one kernel, for an optimizer that ``can_fuse``.

    The original example looks for "bn" in the parameters' names, which no VGG layer has; here the layer's type decides.

    Raises:
        KeyError: no optimizer of that name.
    """
    spared: list[nn.Parameter] = []  # from weight decay
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            spared += [] if config.bn_weight_decay else module.parameters(recurse=False)
        elif config.bias_weight_decay is False and isinstance(getattr(module, "bias", None), nn.Parameter):
            spared.append(module.bias)  # type: ignore[arg-type]
    chosen = OPTIMIZERS[config.optimizer]
    options = {name: getattr(config, setting) for name, setting in chosen.options.items()}
    options.update({"fused": True} if fused else {})  # not a word that old versions of torch know
    groups = _groups(model.parameters(), spared)
    return without_compiler(chosen.optimizer)(groups, lr=config.lr, weight_decay=config.weight_decay, **options)


def _groups(parameters: Iterable[nn.Parameter], spared: list[nn.Parameter]) -> list[dict[str, Any]]:
    spared_ids = {id(p) for p in spared}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in spared_ids]}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return groups


class Targets(NamedTuple):
    """The targets of a batch."""

    labels: Tensor  # (N,)
    others: Tensor | None = None  # (N,), of the images that were blended in
    share: Tensor | None = None  # of the first label, 0 to 1; one number on the device


class Objective(nn.Module):
    """Mixup, cutmix and label smoothing, where they are asked for; else the plain cross entropy.

    Mixup adds two images pixel by pixel (Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization"), cutmix
    pastes a rectangle of one into the other (Yun et al. 2019, "CutMix"). The share of each is drawn from Beta(alpha,
    alpha), one for the whole batch; an image's partner is its neighbour in the batch, which is shuffled.
    """

    def __init__(self, config: Settings, device: Device) -> None:
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


class Average:
    """``network`` has the averaged weights. ``decay`` of them is kept at each step, fewer while there were few.

    Source: Polyak and Juditsky 1992; kept exponentially, as torchvision's and timm's reference scripts do.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """After optimizer step ``step``, from 1. Batch norm's statistics are averages already: they are copied."""
        kept = min(self.decay, (1 + step) / (10 + step))  # the first weights are random, and soon forgotten
        for average, value in zip(self.network.parameters(), network.parameters()):
            average.mul_(kept).add_(value, alpha=1 - kept)
        for own, statistic in zip(self.network.buffers(), network.buffers()):
            own.copy_(statistic)
