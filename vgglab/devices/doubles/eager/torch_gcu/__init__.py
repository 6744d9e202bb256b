"""Double of the eager generation of torch_gcu: the simulated card, loaded like the vendor's package, with a call log.

It adds what the simulated card alone does not show: how ``import torch`` loads the package (``torch.backends`` entry
point, ``TORCH_DEVICE_BACKEND_AUTOLOAD``; ``torch_gcu/__init__.py`` of the vendor's repository), the order of calls
around distributed training, and what an adapter must not touch.
"""

import os

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_original_autoload = os.environ.get(_AUTOLOAD)
os.environ[_AUTOLOAD] = "0"  # stays 0 if this is imported before torch, for child processes, too

IS_CONTRACT_DOUBLE = True
__version__ = "2.10.0"


def _autoload():
    """Called by ``import torch``; restores the variable."""
    os.environ[_AUTOLOAD] = _original_autoload or "1"


from torch_gcu.contract import ContractViolation, install_checks, log  # noqa: E402
from vgglab.devices import sim  # noqa: E402

__all__ = ["ContractViolation", "log"]

sim.install()
install_checks()
