"""A moving average of the weights, which is tested in their place.

Source: Polyak and Juditsky 1992; kept exponentially, as torchvision's and timm's reference scripts do.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """``network`` has the averaged weights. ``decay`` of them is kept at each step, fewer while there were few."""

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
