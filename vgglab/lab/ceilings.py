"""The limits of a machine, measured: arithmetic and memory bandwidth."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor

from vgglab.devices.base import Device
from vgglab.errors import UserError
from vgglab.view.anatomy_table import Ceilings

# A matrix product grows until it takes so long that starting it and reading the clock no longer count.
PRODUCT_SECONDS, SMALLEST_SIDE, LARGEST_SIDE = 0.05, 512, 8192
COPIED_BYTES = 2**28  # each of three tensors: far above any cache, of a core (32 MiB) or a card (50 MiB)


def ceilings(device: Device, repeats: int = 5) -> Ceilings:
    """Measure the peak FLOP/s and memory bandwidth of ``device``, the best of ``repeats``; needs 0.8 GB of memory.

    FLOP/s: square matrix products in float32. Bandwidth: a copy (2 tensors) and ``a = b + 2 c`` (3 tensors), counted as
    in J. McCalpin's STREAM: the bytes that the program names, not those that a cache reads before it writes.

    Raises:
        UserError: a simulated card, which has no speed.
    """
    peak = product_flop_per_second(device, "float32", repeats)
    a, b, c = (moved(torch.ones(COPIED_BYTES // 4), device) for _ in range(3))  # 4 bytes a float32
    copying = 2 * COPIED_BYTES / _fastest(partial(a.copy_, b), device, repeats)
    adding = 3 * COPIED_BYTES / _fastest(partial(torch.add, b, c, alpha=2, out=a), device, repeats)
    return Ceilings(peak, max(copying, adding))


def product_flop_per_second(device: Device, dtype: str, repeats: int = 5) -> float:
    """FLOP/s of the fastest square matrix product in ``dtype``; each of its n^3 multiply-adds is two operations.

    Raises:
        UserError: a simulated card, which has no speed.
    """
    if device.is_simulated:
        raise UserError(f"--device {device.kind}: a simulated card has no speed to measure")
    side, seconds, peak = SMALLEST_SIDE, 0.0, 0.0
    while seconds < PRODUCT_SECONDS and side <= LARGEST_SIDE:
        factors = [moved(torch.rand(side, side), device).to(getattr(torch, dtype)) for _ in range(2)]
        seconds = _fastest(partial(torch.matmul, *factors), device, repeats)
        peak = max(peak, 2 * side**3 / seconds)
        side *= 2
    return peak


def _fastest(run: Callable[[], Tensor], device: Device, repeats: int) -> float:
    return min([timed(run, device)[0] for _ in range(1 + repeats)][1:])  # the first is warm-up


def timed(run: Callable[[], Any], device: Device) -> tuple[float, Any]:
    """Seconds of ``run`` to the end of the work on the device, and its result: a tensor, or a tuple of tensors."""
    started = time.perf_counter()
    result = run()
    last = result[-1] if isinstance(result, tuple) else result
    device.fetch(last.detach().reshape(-1)[:1])  # to read a value is to wait until it is there
    return time.perf_counter() - started, result


def moved(tensor: Tensor, device: Device) -> Tensor:
    """Move a tensor to the device."""
    return device.move(tensor, torch.zeros(1, dtype=torch.int64))[0]
