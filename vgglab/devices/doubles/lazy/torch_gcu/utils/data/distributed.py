"""The double of ``torch_gcu.utils.data.distributed``."""

from torch.utils.data.distributed import DistributedSampler as StockSampler

from torch_gcu.core.contract import log


class DistributedSampler(StockSampler):
    _has_epoch = False

    def set_epoch(self, epoch):
        log.call("set_epoch", epoch=epoch)
        self._has_epoch = True
        super().set_epoch(epoch)

    def __iter__(self):
        if not self._has_epoch:
            log.violation("set_epoch was not called before this epoch")
        self._has_epoch = False
        return super().__iter__()
