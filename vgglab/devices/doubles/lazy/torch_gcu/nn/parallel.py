"""The double of ``torch_gcu.nn.parallel``."""

import os

from torch.nn.parallel import DistributedDataParallel as StockParallel

from torch_gcu.core.contract import log
from torch_gcu.core.tensor import Plain, is_on_card


class DistributedDataParallel(StockParallel):
    def __init__(
        self,
        module,
        device_ids=None,
        output_device=None,
        dim=0,
        broadcast_buffers=True,
        process_group=None,
        bucket_cap_mb=256,
        find_unused_parameters=False,
        check_reduction=False,
        gradient_as_bucket_view=False,
    ):
        if device_ids is None:
            log.violation("device_ids=None uses all cards of the machine in one process; pass [LOCAL_RANK]")
        if device_ids is not None and len(device_ids) > 1:
            raise RuntimeError("device_ids must contain exactly one card")
        if gradient_as_bucket_view:
            raise RuntimeError("gradient_as_bucket_view is not supported")
        if device_ids is not None and device_ids != [int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))]:
            log.violation(f"device_ids={device_ids} on local rank {os.environ.get('LOCAL_RANK')}")
        if not all(is_on_card(parameter) for parameter in module.parameters()):
            log.violation("DistributedDataParallel: the module is not on the card")
        log.call("DistributedDataParallel", device_ids=device_ids)
        with Plain():
            super().__init__(module, broadcast_buffers=broadcast_buffers, bucket_cap_mb=bucket_cap_mb)
