"""The interface between vgglab and the hardware.

A command opens its device once and passes it to the trainer; no module outside this package depends on the kind of
hardware. This module imports torch only when a device is opened, so that the parser and the views can list the devices
without it.

    base.py       the interface, with the plain PyTorch step
    native.py     cpu, cuda, mps
    gcu_eager.py  the current torch_gcu: device "gcu", backend "eccl"
    gcu_lazy.py   the torch_gcu of T20 cards: device "xla", torch 1.10, one graph per step
    gcu_sim.py    gcu-sim: gcu_eager.py on the simulated card of sim/
    gcu.py        finds torch_gcu and determines its generation
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterator

from vgglab.errors import UserError

if TYPE_CHECKING:
    from vgglab.devices.base import Device

# The adapter module of each kind. ``auto`` selects the first available kind, so it never gets past cpu.
KINDS = {"gcu": "gcu", "cuda": "native", "mps": "native", "cpu": "native", "gcu-sim": "gcu_sim"}
ALIASES = {"gpu": "cuda"}  # as in the second README of the original example
DEVICE_CHOICES = ("auto", *KINDS, *ALIASES)
AMP_DTYPES = ("float16", "bfloat16")
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # torch >= 2.5: unset or "1" lets `import torch` load torch_gcu


@dataclass(frozen=True)
class DeviceOptions:
    """The options of a device, as given by the flags."""

    amp_dtype: str | None = None  # None: full float32; "auto": the device's own choice; or one of AMP_DTYPES
    tf32: bool | None = None  # None: float32, unless the environment enables TF32 (T20 cards only)
    fast: bool = False  # the fastest supported mode; amp_dtype, channels_last and fused override it
    channels_last: bool | None = None
    fused: bool | None = None  # one kernel for the whole optimizer step
    compile: bool = False
    timers: bool = False  # average gradients after the backward pass, to time this separately
    sync_bn: bool = False  # batch norm over all ranks
    broadcast_buffers: bool = False  # send rank 0's buffers to all ranks before each step
    world_size: int = 1  # number of ranks if no launcher has set WORLD_SIZE
    init_method: str = "env://"  # how the ranks find each other

    @property
    def amp(self) -> str | None:
        """``amp_dtype`` if set; otherwise ``auto`` (the device chooses) if ``fast`` is set, else None."""
        return "auto" if self.fast and self.amp_dtype is None else self.amp_dtype


def import_torch(name: str) -> None:
    """Import torch for the device that the flags name, unless this process has imported it already.

    ``import torch`` also loads the card's library if one is installed, and fails if that library is broken. Other
    devices do not need the library, and a simulated card conflicts with it, so it is not loaded for them.

    Raises:
        UserError: torch is not installed, or cannot be imported, e.g. because a card's library is broken.
    """
    if name not in ("auto", "gcu"):
        os.environ[AUTOLOAD] = "0"
    if "torch" in sys.modules:
        return
    gc.disable()  # the import leaves no garbage, but searching for it would take a fifth of the time
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError(f"PyTorch is not installed for {sys.executable}; activate .venv, or see the README") from None
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"--device {name}: torch cannot be imported ({reason}); run python -m vgglab.doctor") from None
    finally:
        gc.freeze()
        gc.enable()


def open_device(name: str, **options: Any) -> Device:
    """Create the device for this process; its method ``open()`` joins the other ranks.

    Args:
        name: one of ``DEVICE_CHOICES``; ``auto`` selects the first available of gcu, cuda, mps and cpu.
        options: the fields of ``DeviceOptions``.

    Raises:
        UserError: unknown name, no such device on this machine, or an option that it does not support.
    """
    if name not in DEVICE_CHOICES:
        raise UserError(f"device: {name!r} is not one of {', '.join(DEVICE_CHOICES)}")
    device_options = DeviceOptions(**options)
    kind = ALIASES.get(name, name)
    reasons = []
    if name == "auto":
        for kind, reason in availability(device_options):  # noqa: B007
            if reason is None:
                break
            reasons.append(reason)
    device = _adapter_module(kind).open_adapter(kind, device_options)
    device.warnings += [f"--device auto selected {kind}: {reason}" for reason in reasons if reason]
    return device


def availability(options: DeviceOptions) -> Iterator[tuple[str, str | None]]:
    """Yield ``(kind, reason)`` for each kind of real device, best first.

    The reason is None if this machine has such a device, otherwise it says why not ("" if that is obvious). A kind is
    checked only when its pair is requested. Raises UserError if a card's library is broken.
    """
    for kind in KINDS:
        yield kind, _adapter_module(kind).why_unavailable(kind, options)
        if kind == "cpu":  # after it come the simulated devices
            break


def _adapter_module(kind: str) -> Any:
    """Return the adapter module for a kind of device.

    It defines ``open_adapter(kind, options)``, which raises UserError if the device or an option is not available. For
    a real device it also defines ``why_unavailable(kind, options)``, which returns None if this machine has the device,
    otherwise the reason in one line ("" if it is obvious), and raises UserError if the library is broken.
    """
    return importlib.import_module(f"vgglab.devices.{KINDS[kind]}")
