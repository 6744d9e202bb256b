"""The one seam between vgglab and the hardware.

A device object is opened once, at the door, and passed into the engine; no other module tests for a
kind of hardware or names one. This module imports torch only when a device is opened, so that the
parser and the views can ask for the choices without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgglab.errors import UserError

if TYPE_CHECKING:
    from vgglab.devices.base import Device

# "gpu" is the word in the seed kit's second README.
DEVICE_CHOICES = ("auto", "cpu", "cuda", "mps", "gcu", "gpu")
AMP_DTYPES = ("float16", "bfloat16")


def open_device(
    name: str,
    amp_dtype: str | None = None,
    sync_bn: bool = False,
    broadcast_buffers: bool = False,
    world_size: int = 1,
    init_method: str = "env://",
) -> Device:
    """Take the device for this process and, under a launcher, join the other ranks.

    Args:
        name: one of ``DEVICE_CHOICES``; ``auto`` takes cuda, mps or cpu, the first that is there.
        amp_dtype: ``None`` for full float32, ``auto`` for the device's own choice, or one of ``AMP_DTYPES``.
        sync_bn: batch norm over all ranks.
        broadcast_buffers: send rank 0's buffers to all ranks before each step.
        world_size: ranks to expect where no launcher has set ``WORLD_SIZE``.
        init_method: how the ranks find each other.

    Raises:
        UserError: the machine has no such device, or the device cannot do what is asked.
    """
    if name == "gcu":
        raise UserError("--device gcu: this version does not drive GCU cards yet; choose auto, cpu, cuda or mps")
    from vgglab.devices import native

    kind = {"gpu": "cuda", "auto": native.best_kind()}.get(name, name)
    return native.NativeDevice(kind, amp_dtype, sync_bn, broadcast_buffers, world_size, init_method)
