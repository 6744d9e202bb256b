"""The plain PyTorch step, DDP and collectives, for all devices except T20 cards."""

from __future__ import annotations

import inspect
import os
import random
from datetime import timedelta
from typing import Any, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data.distributed import DistributedSampler

from vgglab.devices.base import Device
from vgglab.devices.collectives import sum_over_ranks
from vgglab.devices.compat import parallel_without_compiler
from vgglab.devices.sync_bn import convert_sync_batchnorm
from vgglab.dist import ranks
from vgglab.storage.cache import use_private_temporary_folder

# The original example's static scale: float16 gradients are multiplied by it and it never grows.
LOSS_SCALE, SCALE_GROWTH_INTERVAL = 128.0, 1_000_000_000


class StockDevice(Device):
    """Base class of the devices that use plain PyTorch; subclasses set the attributes below."""

    sampler = DistributedSampler
    _torch_device: torch.device
    _backend: str  # of torch.distributed
    _averages_separately = False
    _parallel: nn.Module | None = None  # the network in DistributedDataParallel

    def open(self) -> None:
        assert self._scaler is not None or self.amp_dtype != "float16", "float16 needs a loss scaler"
        if self.world_size > 1:
            ranks.LOST_PEER_PHRASES.add(self._backend)
            store: torch.distributed.Store
            if ranks.RENDEZVOUS in os.environ:
                store = torch.distributed.FileStore(os.environ[ranks.RENDEZVOUS], self.world_size)
            else:
                store, _, _ = next(rendezvous(self._options.init_method, self.rank, self.world_size))
            # After a restart, torchrun passes on the store that still contains the addresses of the previous ranks.
            store = torch.distributed.PrefixStore(f"attempt_{ranks.num_restarts()}", store)
            torch.distributed.init_process_group(
                self._backend,
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(minutes=30),  # the default for gloo; nccl's 10 may be too short for the first epoch
            )

    def close(self) -> None:
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            if self._backend == "gloo" or self.is_simulated:
                # DistributedDataParallel never releases the group and its gloo threads (seen on torch 2.15). If such
                # a thread releases a tensor while Python shuts down, the process aborts. On torch 1.10, destroying
                # the wrapped network waits for such a thread, which waits for the GIL: a deadlock.
                ranks.skip_cleanup_at_exit(keep=self._parallel)

    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # Labels stay int64: the loss has no int32 kernels on the CPU and on eager cards.
        return (
            images.to(self._torch_device, non_blocking=True),
            labels.to(self._torch_device, non_blocking=True),
        )

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        network = model.to(self._torch_device)
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self._averages_separately = self.world_size > 1 and self._options.timers and not self._options.sync_bn
        if self.world_size == 1 or self._averages_separately:
            return self._compiled(network), network
        if self._options.sync_bn:
            is_cuda = self._torch_device.type == "cuda"  # PyTorch's own supports no other device
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if is_cuda else convert_sync_batchnorm(network)
        device_ids = None if self._torch_device.index is None else [self._torch_device.index]
        # torch 2.15 renames the option and warns about the old name.
        has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if has_new_name else "broadcast_buffers"
        # Gradients are views of the all-reduce buckets; otherwise VGG16's 553 MB of gradients are stored twice.
        options: dict[str, Any] = {name: self._options.broadcast_buffers, "gradient_as_bucket_view": True}
        wrap = DistributedDataParallel if self.compiles else parallel_without_compiler
        self._parallel = wrap(network, device_ids=device_ids, **options)
        return self._compiled(self._parallel), network

    def _compiled(self, model: nn.Module) -> nn.Module:
        if not self.compiles:
            return model
        use_private_temporary_folder()  # the compiler stores code there and loads what it finds
        return torch.compile(model)  # type: ignore[return-value]

    @torch.no_grad()
    def average_gradients(self, model: nn.Module) -> None:
        if not self._averages_separately:
            return
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        sum_over_ranks(*gradients)
        for gradient in gradients:
            gradient /= self.world_size

    def backward(self, loss: Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def step(self, optimizer: Optimizer, model: nn.Module, outputs: Sequence[Tensor]) -> None:
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    def flush(self, tensors: Sequence[Tensor]) -> None:
        pass

    def fetch(self, tensor: Tensor) -> list[float]:
        return tensor.cpu().tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self._torch_device)
        if self.world_size > 1:
            tensor = tensor.clone()
            sum_over_ranks(tensor)
        return tensor

    def seed(self, seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)  # also seeds the generator of every card
