"""A simulated GCU card: a real torch device named ``gcu`` whose numbers are computed on the CPU.

    >>> from vgglab.devices import sim
    >>> sim.install()
    >>> torch.ones(2, device="gcu:1") + 1      # torch.gcu, .gcu() and backend "eccl" work, too

It follows these rules of the card: operations do not mix devices, 64-bit types are stored in 32 bits, forked processes
must not use the card, and ``eccl`` accepts only tensors on a card. It also counts host reads. It does not simulate
speed, the card's rounding (results are those of the CPU), missing kernels, or the memory limit.
``VGGLAB_SIM_CARDS`` sets the number of simulated cards (default 8, as in the original example's commands).

It uses PyTorch's experimental Python backend for the PrivateUse1 key (torch >= 2.10), which a process can register only
once.

    card.py      the state of the cards (number, memory use, random numbers)
    tensor.py    the tensor and how operations on it are computed
    autocast.py  mixed precision
    api.py       torch.gcu
    eccl.py      the process group
"""

from __future__ import annotations

import sys

import torch

__version__ = "simulated"
IS_CONTRACT_DOUBLE = True  # for code that is given this module in place of a real torch_gcu

_REQUIREMENT = "needs torch 2.10 or newer"


class CannotSimulate(RuntimeError):
    """This process cannot simulate a card; the message says why."""


def install() -> None:
    """Register the simulated device; a second call does nothing.

    Raises:
        CannotSimulate: torch is too old, or another torch_gcu (or the lazy double) is loaded.
    """
    if is_installed():
        return
    if hasattr(torch, "gcu") or not getattr(sys.modules.get("torch_gcu"), "IS_CONTRACT_DOUBLE", True):
        raise CannotSimulate("a real torch_gcu is loaded in this process; start a new process for the simulated card")
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
    except ImportError:
        raise CannotSimulate(f"{_REQUIREMENT}, but this is {torch.__version__}") from None
    from vgglab.devices.sim import api, autocast, eccl, tensor

    if hasattr(torch.Tensor, "is_gcu"):  # set by a lazy torch_gcu, too; PyTorch adds it only once
        raise CannotSimulate("a lazy torch_gcu is loaded in this process; call sim.install() before loading it")
    register("gcu", api.create_module(), tensor.Hook(), tensor.Guard())
    tensor.register()
    autocast.register()
    eccl.register()
    # The autograd engine has one thread per card and counts a Python backend as one card. With the backward
    # pass in the calling thread, the other cards work, too.
    torch.autograd.set_multithreading_enabled(False)
    # Module.to() keeps the Parameter objects, as for real cards, so an existing optimizer stays valid.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # A Python backend has no page-locked memory: pin_memory() returns the tensor unchanged.
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore


def is_installed() -> bool:
    """Whether ``torch.gcu`` is the simulated card."""
    return getattr(getattr(torch, "gcu", None), "IS_SIMULATED", False)


def num_host_reads() -> int:
    """Return the number of reads from a card in this process; on a real card, each read makes the host wait."""
    from vgglab.devices.sim.card import state

    return state.num_host_reads
