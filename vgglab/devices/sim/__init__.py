"""A simulated GCU card: a real torch device named ``gcu`` whose numbers are computed on the CPU.

    >>> from vgglab.devices import sim
    >>> sim.install()
    >>> torch.ones(2, device="gcu:1") + 1      # torch.gcu, .gcu() and backend "eccl" are there too

What it reproduces of the card's contract: tensors on different devices do not mix, 64-bit types lose their upper half,
every host read is counted, forked processes may not use the card, and ``eccl`` accepts only tensors on it. What it
cannot
show: speed, the card's rounding (results are those of the CPU), missing kernels, and the memory limit.
``VGGLAB_SIM_CARDS`` is the number of simulated cards (default 8, as in the original example's commands).

It uses PyTorch's experimental Python backend for the PrivateUse1 key (torch >= 2.10), which a process can register only
once.

    card.py      the state of the cards: their number, memory use and random numbers
    tensor.py    the tensor and how operations on it are computed
    autocast.py  mixed precision
    api.py       torch.gcu
    eccl.py      the process group
"""

from __future__ import annotations

import sys

import torch

__version__ = "simulated"
IS_CONTRACT_DOUBLE = True  # read where a real torch_gcu is expected in this module's place

_NEEDED = "needs torch 2.10 or newer"


class CannotSimulate(RuntimeError):
    """This process cannot simulate a card; the message says why."""


def install() -> None:
    """Register the simulated device; a second call does nothing.

    Raises:
        CannotSimulate: torch is too old, or another torch_gcu (or the lazy double) uses the name.
    """
    if is_installed():
        return
    if hasattr(torch, "gcu") or not getattr(sys.modules.get("torch_gcu"), "IS_CONTRACT_DOUBLE", True):
        raise CannotSimulate("a real torch_gcu is loaded in this process; start another one for the simulated card")
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
    except ImportError:
        raise CannotSimulate(f"{_NEEDED}, this is {torch.__version__}") from None
    from vgglab.devices.sim import api, autocast, eccl, tensor

    if hasattr(torch.Tensor, "is_gcu"):  # the lazy generation's too, and PyTorch adds it only once
        raise CannotSimulate("a lazy torch_gcu is loaded in this process; install the simulated card before it")
    register("gcu", api.as_module(), tensor.Hook(), tensor.Guard())
    tensor.register()
    autocast.register()
    eccl.register()
    # A Python backend counts as one card to the autograd engine, which has one thread a card; with backward
    # in the calling thread the other cards work too.
    torch.autograd.set_multithreading_enabled(False)
    # Module.to() keeps its Parameter objects, as it does for real cards: an optimizer made before stays right.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # There is no page-locked memory to be had for a Python backend: asking for it is no error, and no gain.
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore


def is_installed() -> bool:
    """Whether ``torch.gcu`` is the simulated card."""
    return getattr(getattr(torch, "gcu", None), "IS_SIMULATED", False)


def num_host_reads() -> int:
    """How often this process has read a value from a card, and so waited for it."""
    from vgglab.devices.sim.card import state

    return state.num_host_reads
