"""What the layers of a chain make of a shape, without computing anything.

torch's meta device knows it too, and imports its compiler for that: two seconds.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

POOLS = (nn.MaxPool2d, nn.AvgPool2d)
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def output_of(module: nn.Module, images: Tensor) -> Tensor:
    """A tensor of the shape that the layer makes of ``images (N, C, H, W)`` or ``(N, C)``, with nothing in it.

    Raises:
        ValueError: the layer cannot take that shape.
    """
    if isinstance(module, nn.Flatten):
        return images.flatten(module.start_dim, module.end_dim)
    if isinstance(module, nn.Linear):
        _refuse_other(images.shape[-1], module.in_features, "values")
        return images.new_empty(*images.shape[:-1], module.out_features)
    channels = images.shape[1]
    _refuse_other(channels, getattr(module, "in_channels", getattr(module, "num_features", channels)), "channels")
    if not isinstance(module, (nn.Conv2d, *POOLS, *ADAPTIVE_POOLS)):
        return images
    sides = [_side(module, axis, side) for axis, side in enumerate(images.shape[2:])]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"nothing is left of {tuple(images.shape)} in a {type(module).__name__}")
    return images.new_empty(len(images), getattr(module, "out_channels", channels), *sides)


def _refuse_other(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise ValueError(f"{found} {what} reach a layer that takes {wanted}")


def _side(module: Any, axis: int, side: int) -> int:
    """Of what a convolution or a pooling writes; the formulas are those in torch's documentation."""
    if isinstance(module, ADAPTIVE_POOLS):
        wanted = _pair(module.output_size)[axis]
        return side if wanted is None else wanted
    if module.padding == "same":
        return side
    kernel, stride = _pair(module.kernel_size)[axis], _pair(module.stride)[axis]
    padding = 0 if module.padding == "valid" else _pair(module.padding)[axis]
    room = side + 2 * padding - _pair(getattr(module, "dilation", 1))[axis] * (kernel - 1) - 1
    if not getattr(module, "ceil_mode", False):
        return room // stride + 1
    rounded_up = -(-room // stride) + 1
    return rounded_up - ((rounded_up - 1) * stride >= side + padding)  # the last window must begin on the image


def window(module: nn.Module, size_in: int, size_out: int) -> tuple[int, int, int]:
    """Neighbours from the first to the last that one output sees, the step to the next output's, the padding before.

    Of the longer side.
    """
    if isinstance(module, (nn.Conv2d, *POOLS)):
        sides = zip(_pair(module.kernel_size), _pair(getattr(module, "dilation", 1)))
        extent = max(dilation * (kernel - 1) + 1 for kernel, dilation in sides)
        padding = {"same": (extent - 1) // 2, "valid": 0}.get(str(module.padding), module.padding)
        return extent, max(_pair(module.stride)), max(_pair(padding))
    if isinstance(module, ADAPTIVE_POOLS):
        # Output i pools from floor(i * in / out) up to ceil((i + 1) * in / out); where windows differ, the widest.
        starts = [i * size_in // size_out for i in range(size_out + 1)]
        ends = [-(-(i + 1) * size_in // size_out) for i in range(size_out)]
        return max(e - s for s, e in zip(starts, ends)), max(b - a for a, b in zip(starts, starts[1:])), 0
    return 1, 1, 0


def _pair(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)
