"""The plain PyTorch step, DDP and collectives, for devices that PyTorch supports itself."""

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
from vgglab.devices.sync_bn import synchronise
from vgglab.dist import ranks
from vgglab.storage.cache import use_private_temporary_folder

# The original example's static scale: float16 gradients are multiplied by it and it never grows.
LOSS_SCALE, SCALE_GROWTH_INTERVAL = 128.0, 1_000_000_000


class StockDevice(Device):
    """A device that differs from the others only in the attributes below."""

    sampler = DistributedSampler
    _torch_device: torch.device
    _backend: str  # of torch.distributed
    _averages_apart = False
    _parallel: nn.Module | None = None  # the network as wrapped for several ranks

    def open(self) -> None:
        assert self._scaler is not None or self.amp_dtype != "float16", "small gradients would become zero"
        if self.world_size > 1:
            assert self._backend in ranks.COLLECTIVES, "its lost connections would be taken for the cause"
            store: torch.distributed.Store
            if ranks.RENDEZVOUS in os.environ:
                store = torch.distributed.FileStore(os.environ[ranks.RENDEZVOUS], self.world_size)
            else:
                store, _, _ = next(rendezvous(self._options.init_method, self.rank, self.world_size))
            # torchrun hands the ranks of a restart the store in which those before them have left their addresses.
            store = torch.distributed.PrefixStore(f"attempt_{ranks.num_restarts()}", store)
            torch.distributed.init_process_group(
                self._backend,
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(minutes=30),  # torch's own for gloo; nccl's 10 is short for a first epoch's files
            )

    def close(self) -> None:
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            if self._backend == "gloo" or self.is_simulated:
                # DistributedDataParallel keeps the group and its gloo threads for good (seen on torch 2.15), and one
                # of them that lets go of a tensor while Python takes itself apart aborts the process. On torch 1.10
                # letting go of the wrapped network waits for such a thread, which waits for Python's lock.
                ranks.skip_cleanup_at_exit(keep=self._parallel)

    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # Labels stay int64: the loss's kernels on the CPU and on eager cards refuse int32.
        return (
            images.to(self._torch_device, non_blocking=True),
            labels.to(self._torch_device, non_blocking=True),
        )

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        network = model.to(self._torch_device)
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self._averages_apart = self.world_size > 1 and self._options.timers and not self._options.sync_bn
        if self.world_size == 1 or self._averages_apart:
            return self._compiled(network), network
        if self._options.sync_bn:
            is_cuda = self._torch_device.type == "cuda"  # elsewhere PyTorch's own has no kernels
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if is_cuda else synchronise(network)
        device_ids = None if self._torch_device.index is None else [self._torch_device.index]
        # torch 2.15 renames the option and warns of the old name.
        has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if has_new_name else "broadcast_buffers"
        # Gradients live in the buckets that travel: without it VGG16's 553 MB of them are held twice.
        options: dict[str, Any] = {name: self._options.broadcast_buffers, "gradient_as_bucket_view": True}
        wrap = DistributedDataParallel if self.compiles else parallel_without_compiler
        self._parallel = wrap(network, device_ids=device_ids, **options)
        return self._compiled(self._parallel), network

    def _compiled(self, model: nn.Module) -> nn.Module:
        if not self.compiles:
            return model
        use_private_temporary_folder()  # the compiler keeps code in it, and loads what it finds there
        return torch.compile(model)  # type: ignore[return-value]

    @torch.no_grad()
    def average_gradients(self, model: nn.Module) -> None:
        if not self._averages_apart:
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
        torch.manual_seed(seed)  # reaches every card's generator too
