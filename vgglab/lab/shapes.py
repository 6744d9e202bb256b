"""Output shapes and windows of layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

POOLS = (nn.MaxPool2d, nn.AvgPool2d)
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def output_of(module: nn.Module, images: Tensor) -> Tensor:
    """Return a tensor with the shape of the layer's output for ``images``, ``(N, C, H, W)`` or ``(N, C)``.

    Only its shape is meaningful: torch computes it for a batch without images, and with weights that are never read.
    torch's meta device gives the same shapes, but imports torch's compiler, which takes 1.6 CPU-seconds (torch 2.15 on
    an AMD EPYC).

    Raises:
        ValueError, RuntimeError: the layer does not accept that shape.
    """
    if isinstance(module, nn.Linear):
        _check_size(module.in_features, images.shape[-1], "input features")
    else:
        channels = images.shape[1]
        _check_size(getattr(module, "in_channels", getattr(module, "num_features", channels)), channels, "channels")
    blank = {id(weight): torch.empty(weight.shape) for weight in [*module.parameters(), *module.buffers()]}
    layer = copy.deepcopy(
        module, blank
    )  # blank is deepcopy's memo: it takes its tensors instead of copying the weights
    return images.new_empty(len(images), *type(module).forward(layer.eval(), images[:0]).shape[1:])


def _check_size(expected: int, actual: int, what: str) -> None:
    if actual != expected:
        raise ValueError(f"expected {expected} {what}, got {actual}")


def window(module: nn.Module, size_in: int, size_out: int) -> tuple[int, int, int]:
    """Return the window size of a layer (its kernel size, including dilation), its stride, and its padding.

    If height and width differ, the larger value is returned.
    """
    if isinstance(module, (nn.Conv2d, *POOLS)):
        sides = zip(_pair(module.kernel_size), _pair(getattr(module, "dilation", 1)))
        extent = max(dilation * (kernel - 1) + 1 for kernel, dilation in sides)
        padding = {"same": (extent - 1) // 2, "valid": 0}.get(str(module.padding), module.padding)
        return extent, max(_pair(module.stride)), max(_pair(padding))
    if isinstance(module, ADAPTIVE_POOLS):
        # Output i pools from floor(i * in / out) to ceil((i + 1) * in / out), exclusive; the widest window counts.
        starts = [i * size_in // size_out for i in range(size_out + 1)]
        ends = [-(-(i + 1) * size_in // size_out) for i in range(size_out)]
        return max(e - s for s, e in zip(starts, ends)), max(b - a for a, b in zip(starts, starts[1:])), 0
    return 1, 1, 0


def _pair(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)
