"""The interface between vgglab and the hardware.

The command opens a device once and passes it to the trainer; no module outside this package names a kind of hardware.
This module imports torch only when a device is opened, so that the parser and the views can list the choices without
it.

    base.py       the interface
    stock.py      the plain PyTorch step, for devices that PyTorch supports itself
    native.py     cpu, cuda, mps
    gcu_eager.py  today's torch_gcu: device "gcu", backend "eccl"
    gcu_lazy.py   the T20 cards' torch_gcu: device "xla", torch 1.10, the step cuts a graph
    gcu_sim.py    gcu-sim: gcu_eager.py on the simulated card of sim/
    gcu.py        finding torch_gcu, and which of the two it is
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vgglab.errors import UserError

if TYPE_CHECKING:
    from vgglab.devices.base import Device

# The module with the adapter of each kind. ``auto`` takes the first that is there, so never what follows the CPU.
KINDS = {"gcu": "gcu", "cuda": "native", "mps": "native", "cpu": "native", "gcu-sim": "gcu_sim"}
ALIASES = {"gpu": "cuda"}  # the word in the original example's second README
DEVICE_CHOICES = ("auto", *KINDS, *ALIASES)
AMP_DTYPES = ("float16", "bfloat16")
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # torch >= 2.5: unset or "1" lets `import torch` load torch_gcu


@dataclass(frozen=True)
class DeviceOptions:
    """The options of a device, as given by the flags."""

    amp_dtype: str | None = None  # None: full float32; "auto": the device's own choice; or one of AMP_DTYPES
    tf32: bool | None = None  # None: as set in the environment, else float32
    fast: bool = False  # the fastest mode, unless the flags below are set
    channels_last: bool | None = None
    fused: bool | None = None  # the optimizer's step in one kernel
    compile: bool = False
    timers: bool = False  # averaging gradients apart from the backward pass, to see what it costs
    sync_bn: bool = False  # batch norm over all ranks
    broadcast_buffers: bool = False  # send rank 0's buffers to all ranks before each step
    world_size: int = 1  # ranks to expect where no launcher has set WORLD_SIZE
    init_method: str = "env://"  # how the ranks find each other

    @property
    def amp(self) -> str | None:
        """``amp_dtype`` if it was given; ``auto``, the device's choice, if only ``fast`` was."""
        return "auto" if self.fast and self.amp_dtype is None else self.amp_dtype


def import_torch(name: str) -> None:
    """Import torch for the first time in this process, for the device that the flags name.

    If a card's library is installed, ``import torch`` loads it, and a broken one makes the import fail. For another
    device it is not needed, and a simulated card would collide with it; so it is not loaded then.

    Raises:
        UserError: torch is not installed, or a card's library that it loads is broken.
    """
    if name not in ("auto", "gcu"):
        os.environ[AUTOLOAD] = "0"
    if "torch" in sys.modules:
        return
    gc.disable()  # all that the import makes stays; looking through it for garbage would take a fifth of the time
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError(f"PyTorch is not installed for {sys.executable}; activate .venv, or see the README") from None
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"--device {name}: torch cannot be imported ({reason}); see python -m vgglab.doctor") from None
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
    asked = DeviceOptions(**options)
    if name != "auto":
        kind = ALIASES.get(name, name)
        return _adapters(kind).open_adapter(kind, asked)
    notes: list[str] = []
    for kind in KINDS:
        reason = _adapters(kind).why_unavailable(kind, asked)
        if reason is None:
            break
        notes += filter(None, [reason])
    device = _adapters(kind).open_adapter(kind, asked)
    device.warnings += [f"--device auto took {device.kind}: {note}" for note in notes]
    return device


def _adapters(kind: str) -> Any:
    """The module of a kind. It has ``open_adapter(kind, options)``, which raises UserError for what cannot be had, and
    ``why_unavailable(kind, options)``: None if this machine has such a device, else the reason in one line, or ""
    where nobody would ask; UserError for a library that is installed and does not load.
    """
    return importlib.import_module(f"vgglab.devices.{KINDS[kind]}")
