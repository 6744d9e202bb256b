"""Learning rate and optimizer: the seed kit's recipe, as formulas, and the paper's plateaus.

The rate is constant within an epoch. The seed kit applies it after each step, so that the first step of
a run uses the unscaled ``--lr`` and the first step of every epoch the rate of the epoch before; here it is
applied before the step, as the formula means it.
"""

from __future__ import annotations

import math
from typing import Any, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer, RMSprop

from vgglab.compat import without_compiler
from vgglab.config import Config

MILESTONES = (30, 60, 80)
REFERENCE_BATCH_SIZE = 256  # the global batch size that --lr is meant for


def learning_rate(config: Config, epoch: int, world_size: int, num_drops: int = 0) -> float:
    """The rate of ``epoch`` (from 0) with ``world_size`` ranks; ``num_drops`` at plateaus so far.

    With ``base = lr x batch_size x world_size / 256``, warm-up rises by ``base / warmup`` an epoch; then

    - step and plateau: ``base x gamma^k``, k drops so far;
    - linear: ``base x (1 - t)`` and cosine: ``end + (base - end) x (1 + cos(pi t)) / 2``, where t runs
      from 0 after warm-up and would reach 1 at epoch ``epochs``, one past the last.
    """
    base = config.lr * config.batch_size * world_size / REFERENCE_BATCH_SIZE
    if epoch < config.warmup:
        return base * (epoch + 1) / config.warmup
    if config.lr_schedule == "plateau":
        return base * config.lr_gamma**num_drops
    if config.lr_schedule == "step":
        return base * config.lr_gamma ** _drops(config, epoch)
    t = (epoch - config.warmup) / (config.epochs - config.warmup)
    if config.lr_schedule == "linear":
        return base * (1 - t)
    return config.end_lr + (base - config.end_lr) * 0.5 * (1 + math.cos(math.pi * t))


def _drops(config: Config, epoch: int) -> int:
    if config.lr_step_size is not None:
        return epoch // config.lr_step_size
    return sum(milestone <= epoch for milestone in MILESTONES)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def build_optimizer(config: Config, model: nn.Module, fused: bool = False) -> Optimizer:
    """SGD or RMSprop; weights and biases decay, batch norm does not unless asked for, biases not if asked.

    ``fused``: SGD makes its step in one kernel; RMSprop has none.

    The seed kit looks for "bn" in the parameters' names, which no VGG layer carries; here the layer's type decides.
    """
    spared: list[nn.Parameter] = []  # from weight decay
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            spared += [] if config.bn_weight_decay else module.parameters(recurse=False)
        elif config.bias_weight_decay is False and isinstance(getattr(module, "bias", None), nn.Parameter):
            spared.append(module.bias)  # type: ignore[arg-type]
    groups = _groups(model.parameters(), spared)
    options: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    if config.optimizer == "rmsprop":
        return without_compiler(RMSprop)(groups, alpha=config.rmsprop_alpha, eps=config.rmsprop_eps, **options)
    if fused:
        options["fused"] = True
    return without_compiler(SGD)(groups, nesterov=config.nesterov, **options)


def _groups(parameters: Iterable[nn.Parameter], spared: list[nn.Parameter]) -> list[dict[str, Any]]:
    spared_ids = {id(p) for p in spared}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in spared_ids]}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return groups
