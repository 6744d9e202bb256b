"""The T20 cards' torch_gcu (torch 1.10, Python 3.8, device ``xla``).

Lazy execution: operations are only recorded; a graph is compiled and run when outputs are requested. So each training
step ends with exactly one such request, which names everything to be kept, and no value is read before it: a read would
split the step into two graphs. The order of calls is that of Enflame's own VGG script (ModelZoo, ``vgg/train.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import time
from typing import Any, ContextManager, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab.devices import DeviceOptions
from vgglab.devices.base import Device
from vgglab.devices.stock import LOSS_SCALE, SCALE_GROWTH_INTERVAL
from vgglab.dist import ranks
from vgglab.errors import UserError


class LazyGcu(Device):
    """A card of the lazy generation."""

    kind = "gcu"
    worker_start = "spawn"  # as in the vendor's script
    pins_memory = False  # on torch 1.10 that works with CUDA only
    _parallel: nn.Module | None = None  # the network as wrapped for several ranks
    can_average = False  # it would have to be part of the step's graph, and its factor a new constant in each

    def __init__(self, options: DeviceOptions, torch_gcu: Any, tf32: bool) -> None:
        super().__init__(options)
        for module in ("amp", "distributed", "nn.parallel", "utils.data.distributed"):
            importlib.import_module(f"torch_gcu.{module}")
        self._gcu = torch_gcu
        self.is_simulated = getattr(torch_gcu, "IS_CONTRACT_DOUBLE", False)
        self._take_card_of(torch_gcu.device_count())
        self.amp_dtype = "float16" if options.amp == "auto" else options.amp
        self.tf32 = tf32  # settled before torch_gcu was imported, not to be changed now
        self._check()
        self.sampler = torch_gcu.utils.data.distributed.DistributedSampler
        # gcu_device, not device: that one is a context manager.
        self._torch_device = torch_gcu.gcu_device(self.local_rank)
        self._mode = torch_gcu.JitRunMode.ASYNC if self.world_size > 1 else torch_gcu.JitRunMode.SAFEASYNC
        self._scaler = self._loss_scaler() if self.amp_dtype else None

    def _check(self) -> None:
        if self._options.sync_bn and self.world_size > 1:
            raise UserError("--sync-bn: not supported by this torch_gcu; leave it out")
        if self.world_size > 1 and not hasattr(self._gcu.distributed, "init_process_group"):
            # It defines nothing where torch sees CUDA.
            raise UserError(
                "--device gcu: torch_gcu.distributed is empty if torch sees a CUDA device; set CUDA_VISIBLE_DEVICES=''"
            )

    def _loss_scaler(self) -> Any:
        # use_zero_grad: on overflow the gradients are zeroed on the card. The other path reads from the card in
        # each step, and in the release at hand it fails at once.
        return self._gcu.amp.GradScaler(
            init_scale=LOSS_SCALE, growth_interval=SCALE_GROWTH_INTERVAL, use_zero_grad=True
        )

    def open(self) -> None:
        if self.world_size > 1:
            # torch_gcu's own module: torch.distributed has no eccl.
            self._gcu.distributed.init_process_group(
                backend="eccl", init_method=self._options.init_method, world_size=self.world_size, rank=self.rank
            )

    def close(self) -> None:
        if self.world_size > 1 and self._gcu.distributed.is_initialized():
            self._gcu.distributed.destroy_process_group()
            if self.is_simulated:  # the double has gloo underneath: see StockDevice.close
                ranks.skip_cleanup_at_exit(keep=self._parallel)

    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # int32, as the vendor's script has it. Batches of one shape only: a new shape is a new graph to compile;
        # so training leaves out the last batch if it is not full, and evaluation pays for one more graph.
        # The vendor's scripts send float32, and whether a T20 accepts bytes is not documented.
        return images.float().to(self._torch_device), labels.int().to(self._torch_device)

    def mark(self) -> float:
        return time.perf_counter()  # it has no events; an interval ends with a read, so its time is right

    def seconds_between(self, earlier: float, later: float) -> float:
        return later - earlier

    def autocast(self) -> ContextManager[Any]:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return self._gcu.amp.autocast(dtype=getattr(torch, self.amp_dtype))

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        network = model.to(self._torch_device)
        if self.world_size == 1:
            return network, network
        # Its own class. Without device_ids it would take all cards of the machine; views into buckets it refuses.
        parallel = self._gcu.nn.parallel.DistributedDataParallel(
            network, device_ids=[self.local_rank], broadcast_buffers=self._options.broadcast_buffers
        )
        self._parallel = parallel
        return parallel, network

    def backward(self, loss: Tensor) -> None:
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def step(self, optimizer: Optimizer, model: nn.Module, outputs: Sequence[Tensor]) -> None:
        if self._scaler is None:
            # A list of the card's tensors and nothing else: a stranger in it has all of them dropped, silently.
            self._gcu.optimizer_step(optimizer, list(outputs), model=model, mode=self._mode)
            return
        self._scaler.step(optimizer)
        self._scaler.update()
        kept = self._gcu.collect_amp_training_params(model, optimizer, self._scaler)
        self._gcu.unlazy([*kept, *outputs], mode=self._mode)

    def flush(self, tensors: Sequence[Tensor]) -> None:
        if tensors:  # a graph without outputs is not allowed
            self._gcu.unlazy(list(tensors), mode=self._mode)

    def fetch(self, tensor: Tensor) -> list[float]:
        return tensor.cpu().tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self._torch_device)
        if self.world_size > 1:
            tensor = tensor.clone()
            self._gcu.distributed.all_reduce(tensor, op=self._gcu.distributed.ReduceOp.SUM)
        return tensor

    def seed(self, seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)  # does not reach the cards on torch 1.10
        self._gcu.manual_seed_all(seed)

    def describe(self) -> dict[str, Any]:
        return {
            "device": self.kind,
            "hardware": str(self._gcu.get_device_name(self.local_rank)),
            "num_cpus": os.cpu_count(),
            "num_threads": torch.get_num_threads(),
            "amp_dtype": self.amp_dtype,
            "tf32": self.tf32,
            "simulated": self.is_simulated,
            "versions": {"torch_gcu": str(self._gcu.get_version())},
        }

    def usage(self) -> dict[str, Any]:
        return {}  # this generation counts what is allocated now, not the most there was
