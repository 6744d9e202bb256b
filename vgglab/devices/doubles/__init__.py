"""Contract doubles: stand-ins for the vendor's two ``torch_gcu`` libraries, for tests and for study.

They compute on the CPU, log every call in order, and raise ``ContractViolation`` at the line that breaks the contract.
``LAZY`` and ``EAGER`` are folders for ``PYTHONPATH``; if one of them comes first, ``--device gcu`` uses the double,
and everything that a run writes is marked ``simulated``:

    PYTHONPATH=$(python -m vgglab.devices.doubles lazy) python -m vgglab.train --device gcu

The lazy double needs torch 1.10 or later, the eager one the same torch as the simulated card. ``VGGLAB_DOUBLE_CARDS``
sets the number of cards. ``VGGLAB_DOUBLE_LOG`` names a file to which each rank appends its calls, one JSON object per
line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

LAZY = Path(__file__).resolve().parent / "lazy"
EAGER = Path(__file__).resolve().parent / "eager"


def load_lazy() -> Any:
    """Import the test double of the T20's library as ``torch_gcu``; ``torch.Tensor.to`` stays patched from then on."""
    if str(LAZY) not in sys.path:
        sys.path.insert(0, str(LAZY))
    import torch_gcu

    return torch_gcu
