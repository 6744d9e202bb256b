"""Measure the limits of a machine: peak FLOP/s and memory bandwidth."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor

from vgglab.devices.base import Device
from vgglab.errors import UserError
from vgglab.view.anatomy_table import Ceilings

# Matrices are enlarged until a product takes long enough to make launch and timer overhead negligible.
PRODUCT_SECONDS, SMALLEST_SIDE, LARGEST_SIDE = 0.05, 512, 8192
COPIED_BYTES = 2**28  # of each of three tensors: far more than the cache of a CPU (32 MiB) or a card (50 MiB)


def ceilings(device: Device, repeats: int = 5) -> Ceilings:
    """Measure the peak FLOP/s and memory bandwidth of ``device`` (best of ``repeats``); needs 0.8 GB of memory.

    FLOP/s are those of square float32 matrix products. Bandwidth is that of a copy (2 tensors) or of ``a = b + 2 c``
    (3 tensors), whichever is higher. Bytes are counted as in J. McCalpin's STREAM: those that the program reads and
    writes, without the cache's write-allocate traffic.

    Raises:
        UserError: the card is simulated, so it has no speed.
    """
    peak = product_flop_per_second(device, "float32", repeats)
    a, b, c = (to_device(torch.ones(COPIED_BYTES // 4), device) for _ in range(3))  # 4 bytes per float32
    copy_bandwidth = 2 * COPIED_BYTES / _fastest(partial(a.copy_, b), device, repeats)
    add_bandwidth = 3 * COPIED_BYTES / _fastest(partial(torch.add, b, c, alpha=2, out=a), device, repeats)
    return Ceilings(peak, max(copy_bandwidth, add_bandwidth))


def product_flop_per_second(device: Device, dtype: str, repeats: int = 5) -> float:
    """Return the FLOP/s of the fastest square matrix product in ``dtype``, counting a multiply-add as two operations.

    Raises:
        UserError: the card is simulated, so it has no speed.
    """
    if device.is_simulated:
        raise UserError(f"--device {device.kind}: a simulated card has no speed to measure")
    side, seconds, peak = SMALLEST_SIDE, 0.0, 0.0
    while seconds < PRODUCT_SECONDS and side <= LARGEST_SIDE:
        factors = [to_device(torch.rand(side, side), device).to(getattr(torch, dtype)) for _ in range(2)]
        seconds = _fastest(partial(torch.matmul, *factors), device, repeats)
        peak = max(peak, 2 * side**3 / seconds)
        side *= 2
    return peak


def _fastest(run: Callable[[], Tensor], device: Device, repeats: int) -> float:
    return min([time_call(run, device)[0] for _ in range(1 + repeats)][1:])  # the first is warm-up


def time_call(run: Callable[[], Any], device: Device) -> tuple[float, Any]:
    """Call ``run``; return the seconds until its work on the device is done, and its result (a tensor, or a tuple)."""
    started = time.perf_counter()
    result = run()
    last = result[-1] if isinstance(result, tuple) else result
    device.fetch(last.detach().reshape(-1)[:1])  # reading a value waits until it is computed
    return time.perf_counter() - started, result


def to_device(tensor: Tensor, device: Device) -> Tensor:
    """Move a tensor to the device."""
    return device.move(tensor, torch.zeros(1, dtype=torch.int64))[0]
