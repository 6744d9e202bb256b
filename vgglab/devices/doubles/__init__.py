"""Contract doubles: stand-ins for the vendor's two ``torch_gcu`` libraries, for tests and for looking at the contract.

They compute on the CPU and watch how they are called: an ordered log of the calls, and ``ContractBroken`` at the line
that does not keep the contract. ``LAZY`` and ``EAGER`` are folders for ``PYTHONPATH``; with one of them in front,
``--device gcu`` finds a torch_gcu, and what it writes says ``simulated``:

    PYTHONPATH=$(python -m vgglab.devices.doubles lazy) python -m vgglab.train --device gcu

The lazy one runs on every torch from 1.10 on, the eager one where the simulated card does. ``VGGLAB_DOUBLE_CARDS``
sets the number of cards, ``VGGLAB_DOUBLE_LOG`` names a file to which each rank's calls are added, a JSON object a line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

LAZY = Path(__file__).resolve().parent / "lazy"
EAGER = Path(__file__).resolve().parent / "eager"


def load_lazy() -> Any:
    """The lazy double as ``torch_gcu`` in this process, for a notebook; it changes ``torch.Tensor.to`` for good."""
    if str(LAZY) not in sys.path:
        sys.path.insert(0, str(LAZY))
    import torch_gcu  # type: ignore[import-not-found]

    return torch_gcu
