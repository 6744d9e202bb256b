"""Double of the lazy generation of torch_gcu: its functions and rules, without a card.

The interface is that of Enflame's Python package for torch 1.10 (``core/model.py``, ``core/device.py``,
``core/random.py``, ``amp/``, ``distributed/``); see ``vgglab/devices/doubles/__init__.py``. Like the real one, it
patches ``torch.Tensor`` on import and uses the torch.device type ``xla``.
"""

import os

from torch_gcu.core.contract import ContractViolation, log
from torch_gcu.core.device import (
    current_device,
    device,
    device_count,
    gcu_device,
    get_device_name,
    get_version,
    is_available,
    set_device,
)
from torch_gcu.core.model import (
    JitRunMode,
    collect_amp_training_params,
    collect_buffers,
    optimizer_step,
    sync_lived_tensor,
    synchronize,
    unlazy,
)
from torch_gcu.core.patches import install
from torch_gcu.core.random import manual_seed_all

IS_CONTRACT_DOUBLE = True
__all__ = [
    "ContractViolation",
    "JitRunMode",
    "collect_amp_training_params",
    "collect_buffers",
    "current_device",
    "device",
    "device_count",
    "gcu_device",
    "get_device_name",
    "get_version",
    "is_available",
    "log",
    "manual_seed_all",
    "optimizer_step",
    "set_device",
    "sync_lived_tensor",
    "synchronize",
    "unlazy",
]

log.tf32_at_import = os.environ.get("ENFLAME_ENABLE_TF32")
log.call("import", tf32=log.tf32_at_import)
install()

from torch_gcu import amp, distributed  # noqa: E402, F401
from torch_gcu.nn import parallel  # noqa: E402, F401
from torch_gcu.utils.data import distributed as _sampler  # noqa: E402, F401
