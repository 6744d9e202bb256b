"""cpu, cuda and mps: plain PyTorch."""

from __future__ import annotations

import contextlib
import inspect
import os
import platform
import random
from datetime import timedelta
from typing import Any, ContextManager, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vgglab.devices.base import Device
from vgglab.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
AMP_DEFAULTS = {"cpu": "bfloat16", "cuda": "float16"}
# The seed kit's static scale: float16 gradients are multiplied by it and it never grows.
LOSS_SCALE, SCALE_GROWTH_INTERVAL = 128.0, 1_000_000_000


def best_kind() -> str:
    """cuda, mps or cpu: the first that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if _has_mps() else "cpu"


def _has_mps() -> bool:
    backend = getattr(torch.backends, "mps", None)  # torch >= 1.12
    return backend is not None and backend.is_available()


class NativeDevice(Device):
    """A device that PyTorch itself knows."""

    worker_start = "fork"  # workers touch CPU tensors only, and a forked one need not import torch again

    def __init__(
        self,
        kind: str,
        amp_dtype: str | None,
        sync_bn: bool,
        broadcast_buffers: bool,
        world_size: int,
        init_method: str,
    ) -> None:
        self.kind = kind
        self.pins_memory = kind == "cuda"
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", world_size))
        self._init_method = init_method
        self._sync_bn = sync_bn
        self._broadcast_buffers = broadcast_buffers
        self._check(amp_dtype)
        self.amp_dtype = AMP_DEFAULTS[kind] if amp_dtype == "auto" else amp_dtype
        self._scaler = _loss_scaler() if self.amp_dtype == "float16" else None
        self._torch_device = torch.device(kind, self.local_rank) if kind == "cuda" else torch.device(kind)

    def _check(self, amp_dtype: str | None) -> None:
        if self.kind == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no CUDA card here; choose auto or cpu")
        if self.kind == "mps" and not _has_mps():
            raise UserError("--device mps: this is not a Mac with Metal; choose auto or cpu")
        if self.kind == "cuda" and self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node: rank {self.rank} wants card {self.local_rank}, "
                f"this machine has {torch.cuda.device_count()}"
            )
        if amp_dtype is not None and self.kind not in AMP_DEFAULTS:
            raise UserError(f"--amp: not offered on {self.kind}; leave it out to train in float32")
        if amp_dtype == "float16" and self.kind == "cpu":
            raise UserError("--amp-dtype float16: a CPU trains in bfloat16; choose bfloat16")
        if amp_dtype is not None and self.kind == "cpu" and not _cpu_pools_bfloat16():
            raise UserError(f"--amp: the CPU kernels of torch {torch.__version__} lack bfloat16; leave it out")
        if self.world_size > 1 and self.kind not in BACKENDS:
            raise UserError(f"--device {self.kind}: one process only")
        if self.world_size > 1 and "RANK" not in os.environ:
            raise UserError(
                f"--world-size {self.world_size}: nobody started the other ranks; "
                f"use torchrun --nproc_per_node={self.world_size} -m vgglab.train"
            )
        if self._sync_bn and self.world_size > 1 and self.kind == "cpu":
            raise UserError("--sync-bn: PyTorch synchronises batch norm on cards only; leave it out on cpu")

    def open(self) -> None:
        if self.kind == "cuda":
            torch.cuda.set_device(self._torch_device)
        if self.world_size > 1:
            torch.distributed.init_process_group(
                BACKENDS[self.kind],
                init_method=self._init_method,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(minutes=30),  # torch's own for gloo; nccl's 10 is short for a first epoch's files
            )

    def close(self) -> None:
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (
            images.to(self._torch_device, non_blocking=True),
            labels.to(self._torch_device, non_blocking=True),
        )

    def autocast(self) -> ContextManager[Any]:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, dtype=getattr(torch, self.amp_dtype))

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        network = model.to(self._torch_device)
        if self.world_size == 1:
            return network, network
        if self._sync_bn:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        device_ids = [self.local_rank] if self.kind == "cuda" else None
        # torch 2.15 renames the option and warns of the old name.
        has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if has_new_name else "broadcast_buffers"
        # Gradients live in the buckets that travel: without it VGG16's 553 MB of them are held twice.
        options: dict[str, Any] = {name: self._broadcast_buffers, "gradient_as_bucket_view": True}
        return DistributedDataParallel(network, device_ids=device_ids, **options), network

    def backward(self, loss: Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def step(self, optimizer: Optimizer, model: nn.Module, outputs: Sequence[Tensor]) -> None:
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    def fetch(self, tensor: Tensor) -> list[float]:
        return tensor.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self._torch_device)
        if self.world_size > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def seed(self, seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)  # reaches every card's generator too

    def describe(self) -> dict[str, Any]:
        return {
            "device": self.kind,
            "hardware": torch.cuda.get_device_name() if self.kind == "cuda" else _cpu_name(),
            "num_cpus": os.cpu_count(),
            "num_threads": torch.get_num_threads(),
            "amp_dtype": self.amp_dtype,
            "simulated": False,
        }


def _cpu_pools_bfloat16() -> bool:
    """torch 1.10 has autocast on the CPU, and no bfloat16 max pooling."""
    try:
        nn.functional.max_pool2d(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), 2)
    except RuntimeError:
        return False
    return True


def _loss_scaler() -> Any:
    options: dict[str, Any] = {"init_scale": LOSS_SCALE, "growth_interval": SCALE_GROWTH_INTERVAL}
    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):  # torch >= 2.3
        return torch.amp.GradScaler("cuda", **options)
    return torch.cuda.amp.GradScaler(**options)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
