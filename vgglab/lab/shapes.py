"""Output shapes of layers, computed from the formulas in torch's documentation.

torch's meta device gives the same shapes, but imports torch's compiler, which takes 1.6 CPU-seconds (torch 2.15 on an
AMD EPYC).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ContextManager

import torch
from torch import Tensor, nn

HAS_META = int(torch.__version__.split(".")[0]) >= 2  # the meta device (shapes, no memory) supports all layers
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def shapes_only() -> ContextManager[Any]:
    """A context in which new tensors have a shape but no memory, if this torch supports that for all layers."""
    return torch.device("meta") if HAS_META else nullcontext()


def output_of(module: nn.Module, images: Tensor) -> Tensor:
    """Return a tensor with the shape of the layer's output for ``images``, ``(N, C, H, W)`` or ``(N, C)``.

    Only its shape is meaningful; the values are not computed.

    Raises:
        ValueError: the layer does not accept that shape.
    """
    if isinstance(module, nn.Flatten):
        return images.flatten(module.start_dim, module.end_dim)
    if isinstance(module, nn.Linear):
        _check_size(module.in_features, images.shape[-1], "input features")
        return images.new_empty(*images.shape[:-1], module.out_features)
    channels = images.shape[1]
    _check_size(getattr(module, "in_channels", getattr(module, "num_features", channels)), channels, "channels")
    if not isinstance(module, (nn.Conv2d, *POOLS, *ADAPTIVE_POOLS)):
        return images
    sides = [_output_side(module, axis, side) for axis, side in enumerate(images.shape[2:])]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"an input of shape {tuple(images.shape)} is too small for {type(module).__name__}")
    return images.new_empty(len(images), getattr(module, "out_channels", channels), *sides)


def _check_size(expected: int, actual: int, what: str) -> None:
    if actual != expected:
        raise ValueError(f"expected {expected} {what}, got {actual}")


def _output_side(module: Any, axis: int, side: int) -> int:
    """Return the output height (axis 0) or width (axis 1) of a convolution or pooling layer."""
    if isinstance(module, ADAPTIVE_POOLS):
        output_size = _pair(module.output_size)[axis]
        return side if output_size is None else output_size
    if module.padding == "same":
        return side
    kernel, stride = _pair(module.kernel_size)[axis], _pair(module.stride)[axis]
    padding = 0 if module.padding == "valid" else _pair(module.padding)[axis]
    span = side + 2 * padding - _pair(getattr(module, "dilation", 1))[axis] * (kernel - 1) - 1
    if not getattr(module, "ceil_mode", False):
        return span // stride + 1
    rounded_up = -(-span // stride) + 1
    return rounded_up - ((rounded_up - 1) * stride >= side + padding)  # no window starts in the right padding


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
