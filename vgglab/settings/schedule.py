"""Learning-rate schedules: the formulas of the original example, and the paper's plateau rule. Does not import torch.

The rate is constant within an epoch. The original example sets it after each step, so the first step of a run uses the
unscaled ``--lr``, and the first step of each later epoch uses the rate of the previous epoch. Here it is set before the
step, as the formula intends.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Callable, NamedTuple

if TYPE_CHECKING:
    from vgglab.settings.config import Request

MILESTONES = (30, 60, 80)
REFERENCE_BATCH_SIZE = 256  # the global batch size for which --lr is given


class Schedule(NamedTuple):
    """How the learning rate decreases after warm-up."""

    rate: Callable[[Request, float, int, int], float]  # from the settings, base rate, epoch and number of drops so far
    settings: tuple[str, ...] = ()  # the schedule's settings; those of other schedules have no effect
    depends_on_epochs: bool = False  # whether the rate of an epoch depends on --epochs


def _step(config: Request, base: float, epoch: int, num_drops: int) -> float:
    if config.lr_step_size is not None:
        return base * config.lr_gamma ** (epoch // config.lr_step_size)
    return base * config.lr_gamma ** sum(milestone <= epoch for milestone in MILESTONES)


def _plateau(config: Request, base: float, epoch: int, num_drops: int) -> float:
    return base * config.lr_gamma**num_drops


def _linear(config: Request, base: float, epoch: int, num_drops: int) -> float:
    return base * (1 - _progress(config, epoch))


def _cosine(config: Request, base: float, epoch: int, num_drops: int) -> float:
    return config.end_lr + (base - config.end_lr) * 0.5 * (1 + math.cos(math.pi * _progress(config, epoch)))


def _progress(config: Request, epoch: int) -> float:
    return (epoch - config.warmup) / (config.epochs - config.warmup)


SCHEDULES = {
    "step": Schedule(_step, ("lr_step_size", "lr_gamma")),
    "linear": Schedule(_linear, depends_on_epochs=True),
    "cosine": Schedule(_cosine, ("end_lr",), depends_on_epochs=True),
    "plateau": Schedule(_plateau, ("lr_gamma", "lr_patience")),
}


def schedules_with(setting: str) -> str:
    """The names of the schedules that use a setting, for its help text."""
    return " and ".join(name for name, schedule in SCHEDULES.items() if setting in schedule.settings)


def learning_rate(config: Request, epoch: int, world_size: int, num_drops: int = 0) -> float:
    """The learning rate of ``epoch`` (from 0) with ``world_size`` ranks, after ``num_drops`` drops at plateaus.

    With ``base = lr x batch_size x world_size / 256``, warm-up adds ``base / warmup`` per epoch; then

    - step and plateau: ``base x gamma^k`` after k drops;
    - linear: ``base x (1 - t)`` and cosine: ``end + (base - end) x (1 + cos(pi t)) / 2``, where t runs
      from 0 after warm-up and would reach 1 at epoch ``epochs``, one past the last.

    Raises:
        KeyError: unknown schedule.
    """
    base = config.lr * config.batch_size * world_size / REFERENCE_BATCH_SIZE
    if epoch < config.warmup:
        return base * (epoch + 1) / config.warmup
    return SCHEDULES[config.lr_schedule].rate(config, base, epoch, num_drops)
