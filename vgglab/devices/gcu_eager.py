"""Adapter for the current torch_gcu (S60: torch 2.10, device ``gcu``, backend ``eccl``) and the simulated card.

Eager execution: the loop is plain PyTorch, and comments mark the differences from CUDA.
``torch_gcu.transfer_to_gcu`` is never imported, because it rewrites ``torch.cuda`` globally.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from vgglab.devices import AMP_DTYPES, DeviceOptions
from vgglab.devices.base import LOSS_SCALER, Device
from vgglab.errors import UserError


class EagerGcu(Device):
    """A card of the eager generation."""

    kind = "gcu"
    pins_memory = True  # without it, non_blocking copies block
    amp_dtypes = AMP_DTYPES
    _backend = "eccl"

    def __init__(self, options: DeviceOptions, torch_gcu: Any) -> None:
        super().__init__(options)
        self._card_api = torch.gcu  # type: ignore[attr-defined]  # added by torch_gcu
        self._versions = {"torch_gcu": str(getattr(torch_gcu, "__version__", "unknown"))}
        self.is_simulated = getattr(torch_gcu, "IS_CONTRACT_DOUBLE", False)
        self._set_num_cards(self._card_api.device_count())
        if self.amp_dtype == "bfloat16" and not self._card_api.is_bf16_supported():
            raise UserError("--amp-dtype bfloat16: not supported on this card; use float16")
        is_eccl_available = getattr(torch.distributed, "is_eccl_available", lambda: False)
        if self.world_size > 1 and not is_eccl_available():
            raise UserError("--device gcu: several ranks need eccl, which is not installed; install tops-eccl")
        self._autocast = self._card_api.amp.autocast
        self._torch_device = torch.device("gcu", self.local_rank)
        if self.amp_dtype == "float16":
            # By keyword: unlike in torch.amp.GradScaler, the first argument is not a device name.
            # Fused optimizers do not support this scaler.
            self._scaler = self._card_api.amp.GradScaler(**LOSS_SCALER)

    def _hardware(self) -> str:
        card = self._card_api.get_device_properties(self.local_rank)
        return f"{self._card_api.get_device_name(self.local_rank)} {card.major}.{card.minor}"
