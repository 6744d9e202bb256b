"""The optimizer, the device options that flags set, the loss with mixup and cutmix, and averaged weights."""

from __future__ import annotations

import copy
import math
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer, RMSprop

from vgglab.devices.compat import without_compiler
from vgglab.errors import UserError

if TYPE_CHECKING:
    from vgglab.devices.base import Device
    from vgglab.settings.config import Request, Settings


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class OptimizerSpec(NamedTuple):
    """An optimizer that ``--optimizer`` can select."""

    optimizer: type[Optimizer]
    settings: tuple[str, ...]  # its own settings; one that begins with its name, as rmsprop_alpha, sets argument alpha
    changes_every_step: bool  # whether the scalar factors of an update change, as Adam's bias corrections do
    state_keys: tuple[str, ...] = ()  # all entries of its state for each weight, except the momentum buffer
    supports_fused: bool = False  # whether it can update all weights in one kernel

    def num_state_tensors(self, config: Request) -> int:
        """Return the number of state tensors per weight tensor, each as large as the weight; saved in checkpoints."""
        return len({*self.state_keys} - {"step"}) + int("momentum" in self.settings and config.momentum > 0)


OPTIMIZERS = {
    "sgd": OptimizerSpec(SGD, ("momentum", "nesterov"), changes_every_step=False, supports_fused=True),
    "rmsprop": OptimizerSpec(
        RMSprop,
        ("momentum", "rmsprop_alpha", "rmsprop_eps"),
        changes_every_step=False,
        state_keys=("step", "square_avg"),
    ),
}


def build_optimizer(config: Settings, model: nn.Module, fused: bool = False) -> Optimizer:
    """Build the optimizer. Weight decay applies to weights and biases, but to batch norm only with ``bn_weight_decay``.

    The original example looks for "bn" in the parameter names, but no name in VGG contains it; here the type of the
    layer decides. With ``bias_weight_decay=False``, biases are exempt too.

    Args:
        fused: update all weights in one kernel; only valid if the optimizer ``supports_fused``.

    Raises:
        KeyError: unknown optimizer.
    """
    no_decay: list[nn.Parameter] = []  # exempt from weight decay
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            no_decay += [] if config.bn_weight_decay else module.parameters(recurse=False)
        elif config.bias_weight_decay is False and isinstance(getattr(module, "bias", None), nn.Parameter):
            no_decay.append(module.bias)  # type: ignore[arg-type]
    spec = OPTIMIZERS[config.optimizer]
    options = {name.replace(f"{config.optimizer}_", ""): getattr(config, name) for name in spec.settings}
    options.update({"fused": True} if fused else {})  # only if needed: old versions of torch do not accept it
    no_decay_ids = {id(p) for p in no_decay}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in no_decay_ids]}]
    if no_decay:
        groups.append({"params": no_decay, "weight_decay": 0.0})
    return without_compiler(spec.optimizer)(groups, lr=config.lr, weight_decay=config.weight_decay, **options)


def device_options(request: Request) -> dict[str, Any]:
    """Return the device settings of a request as keyword arguments for ``open_device``.

    Raises:
        UserError: ``--fused`` was given and the optimizer has no fused step.
    """
    supports_fused = OPTIMIZERS[request.optimizer].supports_fused
    if request.fused and not supports_fused:
        raise UserError(f"--fused: --optimizer {request.optimizer} has no fused step; leave out --fused")
    return {
        "amp_dtype": request.amp_dtype or ("auto" if request.amp else None),
        "tf32": request.tf32,
        "fast": request.fast,
        "channels_last": request.channels_last,
        "fused": request.fused if supports_fused else False,  # None: it depends on --fast
        "compile": request.compile,
        "timers": request.timers,
        "sync_bn": request.sync_bn,
        "broadcast_buffers": request.broadcast_buffers,
        "world_size": request.world_size,
        "init_method": request.dist_url,
    }


class Targets(NamedTuple):
    """The targets of a batch."""

    labels: Tensor  # (N,)
    mixed_labels: Tensor | None = None  # (N,), labels of the images that were blended in
    ratio: Tensor | None = None  # weight of the first label, 0 to 1; a scalar on the device


class Objective(nn.Module):
    """Cross entropy, with label smoothing, mixup and cutmix if requested.

    Mixup is a weighted average of two images (Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization"); cutmix
    pastes a rectangle of one into the other (Yun et al. 2019, "CutMix"). The mixing ratio is drawn from Beta(alpha,
    alpha), once per batch; each image is blended with its neighbour in the shuffled batch.
    """

    def __init__(self, config: Settings, device: Device) -> None:
        super().__init__()
        self.mixup, self.cutmix, self._device = config.mixup, config.cutmix, device
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def blend(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        """Apply mixup or cutmix to ``images (N, 3, S, S)`` if enabled; uses ``random``, which is seeded each step."""
        methods = [(self.mixup, constant_mask), (self.cutmix, box_mask)]
        enabled = [(alpha, make_mask) for alpha, make_mask in methods if alpha > 0]
        if not enabled:
            return images, Targets(labels)
        alpha, make_mask = random.choice(enabled)
        mask = make_mask(random.betavariate(alpha, alpha), images.shape[-1])
        mask = self._device.move(mask, labels[:1])[0].to(images.dtype)  # (1, 1, S, S): weight of the first image
        blended = images * mask + images.roll(1, 0) * (1 - mask)
        return blended, Targets(labels, labels.roll(1, 0), mask.mean())

    def forward(self, logits: Tensor, targets: Targets) -> Tensor:
        """Return the loss, averaged over the batch, for ``logits (N, num_classes)``."""
        if targets.mixed_labels is None:
            return self.cross_entropy(logits, targets.labels)
        loss_1, loss_2 = (self.cross_entropy(logits, labels) for labels in (targets.labels, targets.mixed_labels))
        return targets.ratio * loss_1 + (1 - targets.ratio) * loss_2  # type: ignore[operator]


def constant_mask(ratio: float, size: int) -> Tensor:
    """A mask ``(1, 1, size, size)`` filled with ``ratio`` (mixup)."""
    return torch.full((1, 1, size, size), ratio)


def box_mask(ratio: float, size: int) -> Tensor:
    """A mask ``(1, 1, size, size)``: 0 in a rectangle with about 1 - ``ratio`` of the area, 1 elsewhere (cutmix)."""
    side = size * math.sqrt(1 - ratio)
    centre_y, centre_x = random.uniform(0, size), random.uniform(0, size)
    top, bottom = (min(size, max(0, round(centre_y + half))) for half in (-side / 2, side / 2))
    left, right = (min(size, max(0, round(centre_x + half))) for half in (-side / 2, side / 2))
    mask = torch.ones(1, 1, size, size)
    mask[:, :, top:bottom, left:right] = 0
    return mask


class WeightAverage:
    """A moving average of the weights, kept in ``network``; the decay per step is smaller during the first steps.

    After Polyak and Juditsky 1992, but exponential, as in the reference scripts of torchvision and timm.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Update after optimizer step ``step`` (from 1); batch-norm statistics are averages already and are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))  # so that the random initial weights are soon forgotten
        for average, value in zip(self.network.parameters(), network.parameters()):
            average.mul_(decay).add_(value, alpha=1 - decay)
        for buffer, statistic in zip(self.network.buffers(), network.buffers()):
            buffer.copy_(statistic)
