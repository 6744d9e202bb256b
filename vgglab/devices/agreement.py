"""Make all ranks agree on a value, which is sent as numbers and summed over the ranks by an all-reduce."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vgglab.devices.base import Device

MAX_PATH_BYTES = 4096
MAX_RANDOM_SEED = 2**20  # exact in float32, the type in which it is sent


def draw_seed(device: Device) -> int:
    """Return a random seed, drawn by rank 0 and broadcast by an all-reduce in which the other ranks contribute 0."""
    import torch

    seed = random.SystemRandom().randrange(MAX_RANDOM_SEED) if device.rank == 0 else 0
    return int(device.fetch(device.sum(torch.tensor([float(seed)])))[0])


def broadcast(text: str, device: Device) -> str:
    """Return rank 0's text on every rank; it is sent as a sum of character codes."""
    import torch

    encoded = text.encode() if device.rank == 0 else b""
    codes = torch.tensor([float(code) for code in encoded.ljust(MAX_PATH_BYTES, b"\0")])
    return bytes(int(code) for code in device.fetch(device.sum(codes))).rstrip(b"\0").decode()


def true_on_all_ranks(condition: bool, device: Device) -> bool:
    """Return whether a condition is true on every rank."""
    import torch

    return device.fetch(device.sum(torch.tensor([float(not condition)])))[0] == 0
