"""Adapter for the torch_gcu of T20 cards (torch 1.10, Python 3.8, device ``xla``).

Lazy execution: operations are only recorded; a graph is compiled and run when outputs are requested. So each training
step ends with exactly one such request, which names everything to be kept, and no value is read before it: a read would
split the step into two graphs. The order of calls is that of Enflame's own VGG script (ModelZoo, ``vgg/train.py``).
"""

from __future__ import annotations

import importlib
from typing import Any, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab.devices import AMP_DTYPES, DeviceOptions
from vgglab.devices.base import LOSS_SCALER, Device
from vgglab.errors import UserError


class LazyGcu(Device):
    """A card of the lazy generation.

    It has no events, so steps are timed on the host; that is correct, because each interval ends with a host read. It
    reports the current memory use, but not the peak. Its torch, 1.10, pins memory for CUDA only.
    """

    kind = "gcu"
    supports = frozenset({"tf32"})
    allows_changing_factors = False  # factors are constants of the graph: each step would compile a new one
    amp_dtypes = AMP_DTYPES
    _backend = "eccl"
    _card_api = None
    times_steps = True  # by the host: recording a step ends with a request to run it

    def __init__(self, options: DeviceOptions, torch_gcu: Any, tf32: bool) -> None:
        super().__init__(options)
        for module in ("amp", "distributed", "nn.parallel", "utils.data.distributed"):
            importlib.import_module(f"torch_gcu.{module}")
        self._gcu, self._distributed = torch_gcu, torch_gcu.distributed  # torch.distributed has no eccl
        self._versions = {"torch_gcu": str(torch_gcu.get_version())}
        self.is_simulated = getattr(torch_gcu, "IS_CONTRACT_DOUBLE", False)
        self._set_num_cards(torch_gcu.device_count())
        self.tf32 = tf32  # set before torch_gcu was imported; cannot be changed now
        if options.sync_bn and self.world_size > 1:
            raise UserError("--sync-bn: not supported by this torch_gcu; leave it out")
        if self.world_size > 1 and not hasattr(self._distributed, "init_process_group"):
            reason = "torch_gcu.distributed is empty if torch sees a CUDA device"
            raise UserError(f"--device gcu: {reason}; set CUDA_VISIBLE_DEVICES=''")
        self.sampler = torch_gcu.utils.data.distributed.DistributedSampler
        # Not torch_gcu.device, which is a context manager.
        self._torch_device = torch_gcu.gcu_device(self.local_rank)
        self._mode = torch_gcu.JitRunMode.ASYNC if self.world_size > 1 else torch_gcu.JitRunMode.SAFEASYNC
        self._autocast = torch_gcu.amp.autocast
        if self.amp_dtype is not None:
            # use_zero_grad: on overflow the gradients are zeroed on the card. The alternative reads from the card
            # in each step, and raises an error in this release.
            self._scaler = torch_gcu.amp.GradScaler(use_zero_grad=True, **LOSS_SCALER)

    def _join_ranks(self) -> None:
        self._distributed.init_process_group(
            backend=self._backend, init_method=self._options.init_method, world_size=self.world_size, rank=self.rank
        )

    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # Labels are int32, as in the vendor's script. Each new batch shape requires compiling another graph, so
        # training drops the last batch if it is not full, and evaluation compiles a second graph for it. Images
        # are sent as float32, as in the vendor's scripts: whether a T20 accepts uint8 is not documented.
        return images.float().to(self._torch_device), labels.int().to(self._torch_device)

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        network = model.to(self._torch_device)
        if self.world_size == 1:
            return network, network
        # torch_gcu's own class. Without device_ids it uses all cards; it does not support gradient_as_bucket_view.
        self._parallel = self._gcu.nn.parallel.DistributedDataParallel(
            network, device_ids=[self.local_rank], broadcast_buffers=self._options.broadcast_buffers
        )
        return self._parallel, network

    def step(self, optimizer: Optimizer, model: nn.Module, outputs: Sequence[Tensor]) -> None:
        if self._scaler is None:
            # The list may contain only tensors on the card: any other entry makes torch_gcu silently drop them all.
            self._gcu.optimizer_step(optimizer, list(outputs), model=model, mode=self._mode)
            return
        self._scaler.step(optimizer)
        self._scaler.update()
        kept = self._gcu.collect_amp_training_params(model, optimizer, self._scaler)
        self._gcu.unlazy([*kept, *outputs], mode=self._mode)

    def flush(self, tensors: Sequence[Tensor]) -> None:
        if tensors:  # a graph without outputs is not allowed
            self._gcu.unlazy(list(tensors), mode=self._mode)

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        self._distributed.all_reduce(tensor, op=self._distributed.ReduceOp.SUM)

    def seed(self, seed: int) -> None:
        super().seed(seed)  # does not seed the cards on torch 1.10
        self._gcu.manual_seed_all(seed)

    def _hardware(self) -> str:
        return str(self._gcu.get_device_name(self.local_rank))
