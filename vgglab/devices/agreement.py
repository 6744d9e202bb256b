"""Values that all ranks must share, sent by rank 0 as numbers over the collective library."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vgglab.devices.base import Device

MAX_PATH_BYTES = 4096
MAX_DRAWN_SEED = 2**20  # exact as a float32, in which it travels between ranks


def draw_seed(device: Device) -> int:
    """A random seed, drawn by rank 0 and sent to all ranks (the other ranks add 0 to a sum)."""
    import torch

    drawn = random.SystemRandom().randrange(MAX_DRAWN_SEED) if device.rank == 0 else 0
    return int(device.fetch(device.sum(torch.tensor([float(drawn)])))[0])


def broadcast(text: str, device: Device) -> str:
    """The text that rank 0 passes in, sent to all ranks in the same way."""
    import torch

    mine = text.encode() if device.rank == 0 else b""
    codes = torch.tensor([float(code) for code in mine.ljust(MAX_PATH_BYTES, b"\0")])
    return bytes(int(code) for code in device.fetch(device.sum(codes))).rstrip(b"\0").decode()


def true_on_all_ranks(condition: bool, device: Device) -> bool:
    """Whether a condition holds on every rank."""
    import torch

    return device.fetch(device.sum(torch.tensor([float(not condition)])))[0] == 0
