"""The interface between trainer and hardware, with the plain PyTorch step; gcu_lazy.py has its own step and sums."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import resource
import sys
import time
from datetime import timedelta
from typing import Any, Callable, ContextManager, Iterable, Iterator, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data.distributed import DistributedSampler

from vgglab.devices import DeviceOptions
from vgglab.devices.collectives import convert_sync_batchnorm, sum_over_ranks
from vgglab.devices.compat import parallel_without_compiler
from vgglab.devices.memory import keep_freed_memory
from vgglab.dist import ranks
from vgglab.errors import UserError
from vgglab.storage.cache import use_private_temporary_folder

# The original example's scale: float16 gradients are multiplied by it; it is halved on overflow and never grows.
LOSS_SCALER: dict[str, Any] = {"init_scale": 128.0, "growth_interval": 1_000_000_000}

# For each mode, the option that requests it, and the device's attribute (and field of env.json) that records it.
MODES = {"channels_last": "channels_last", "fused": "fused", "compile": "compiled", "tf32": "tf32"}

MAX_PATH_BYTES = 4096
MAX_RANDOM_SEED = 2**20  # exact in float32, the type in which it is sent


class Device:
    """One card (or the CPU) as used by one process, and the rank of that process.

    Subclasses set ``kind``, ``supports``, ``amp_dtypes``, ``_torch_device``, ``_card_api``, ``_versions``,
    ``_backend`` and ``_autocast`` (and ``_scaler`` for float16), call ``_set_num_cards`` if there are cards, and define
    ``_hardware``. ``__init__`` reads the first three: it refuses modes and data types that the device does not support,
    and sets ``amp_dtype`` and an attribute for each mode.

    Attributes:
        kind: the name of the device in ``config.json`` and in the report.
        rank, local_rank, world_size: index of this process among all, its index among those on its machine, and
            the number of processes.
        worker_start: how loader workers are started (``fork`` or ``spawn``).
        pins_memory: whether the loader pins memory, so that copies overlap with computation.
        sampler: the class that distributes the indices of an epoch over the ranks; instantiated with
            ``(indices, num_replicas=, rank=, shuffle=False)``, and ``set_epoch`` is called once per epoch.
        amp_dtype: the data type of mixed precision; ``None`` for full float32.
        tf32: whether float32 convolutions and matrix products may be computed in TF32.
        channels_last: whether the channels-last (NHWC) memory layout is used.
        fused: whether the optimizer should use one kernel per step.
        compiled: whether the network is compiled.
        allows_changing_factors: whether scalar factors, such as the decay of averaged weights, may change every step.
        is_host: whether the device is the CPU, in which case reading a value needs no synchronisation.
        is_simulated: whether the card is simulated; if it is, its speed means nothing.
        num_cards: number of cards visible to this process; None on the CPU, which any number of ranks can share.
        supports: which of ``MODES`` the device supports; the others are refused.
        amp_dtypes: the data types of mixed precision that it supports, the one for ``--amp`` first.
        warnings: messages for the user, one line each.
    """

    kind: str
    worker_start: str = "spawn"  # using a card in a forked child is an error
    pins_memory: bool = False
    sampler: type[Any] = DistributedSampler
    amp_dtype: str | None
    tf32: bool
    channels_last: bool
    fused: bool
    compiled: bool
    allows_changing_factors: bool = True
    is_host: bool = False
    is_simulated: bool = False
    num_cards: int | None = None
    supports: frozenset[str] = frozenset()
    amp_dtypes: tuple[str, ...] = ()
    _torch_device: torch.device
    _card_api: Any  # torch.cuda or torch.gcu; None without events and peak memory (CPU, mps, T20)
    _versions: dict[str, str]  # of the packages that the card needs in addition to torch; {} if there are none
    _backend: str  # of the process group
    _distributed: Any = torch.distributed  # the module with the process group
    _autocast: Callable[..., ContextManager[Any]]  # called with dtype=
    _scaler: Any = None  # the loss scaler, if float16 needs one
    _averages_separately = False
    _parallel: nn.Module | None = None  # the network in DistributedDataParallel

    def __init__(self, options: DeviceOptions) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.world_size = int(os.environ.get("WORLD_SIZE", options.world_size))
        self.warnings: list[str] = []
        self._options = options
        for name, field in MODES.items():
            is_on = getattr(options, name)
            if is_on and name not in self.supports:
                raise UserError(f"--{name.replace('_', '-')}: not supported on {self.kind}; leave it out")
            if is_on is None:  # --fast includes these two, if they are supported
                is_on = options.fast and name in self.supports & {"channels_last", "fused"}
            setattr(self, field, is_on)
        if options.amp_dtype is not None and not self.amp_dtypes:
            raise UserError(f"--amp: not supported on {self.kind}; leave it out to train in float32")
        if options.amp_dtype not in (None, "auto", *self.amp_dtypes):
            raise UserError(f"--amp-dtype {options.amp_dtype}: not supported on {self.kind}; use {self.amp_dtypes[0]}")
        self.amp_dtype = next(iter(self.amp_dtypes), None) if options.amp == "auto" else options.amp
        if self.world_size > 1 and "RANK" not in os.environ:
            raise UserError(
                f"--world-size {self.world_size}: no other ranks were started; use --nproc {self.world_size} instead"
            )

    def _set_num_cards(self, num_cards: int) -> None:
        """Store the number of cards. Raises UserError if there is no card for this rank."""
        self.num_cards = num_cards
        if self.local_rank >= num_cards:
            raise UserError(
                f"--nproc: rank {self.rank} needs card {self.local_rank} (counted from 0); "
                f"cards on this machine: {num_cards}"
            )

    def open(self) -> None:
        """Select the card and join the other ranks."""
        assert self._scaler is not None or self.amp_dtype != "float16", "float16 needs a loss scaler"
        if self.is_host:
            keep_freed_memory()
        if self._card_api is not None:
            self._card_api.set_device(self.local_rank)  # before joining the ranks: eccl uses the current card
        if self.world_size > 1:
            ranks.LOST_PEER_PHRASES.add(self._backend)
            if ranks.RENDEZVOUS in os.environ:  # all ranks are on this machine: no other needs to reach them
                loopback = "lo0" if sys.platform == "darwin" else "lo"
                for library in ("gloo", self._backend):  # a simulated card uses gloo, whatever its backend
                    os.environ.setdefault(f"{library.upper()}_SOCKET_IFNAME", loopback)
            self._join_ranks()

    def _join_ranks(self) -> None:
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
        """Leave the process group."""
        if self.world_size > 1 and self._distributed.is_initialized():
            self._distributed.destroy_process_group()
            if self._backend == "gloo" or self.is_simulated:
                # DistributedDataParallel never releases the group and its gloo threads (seen on torch 2.15). If such
                # a thread releases a tensor while Python shuts down, the process aborts. On torch 1.10, destroying
                # the wrapped network waits for such a thread, which waits for the GIL: a deadlock.
                ranks.skip_cleanup_at_exit(keep=self._parallel)

    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Move the batch to the device and convert its types; ``images`` are uint8, ``(N, S, S, 3)``."""
        # Labels stay int64: the loss has no int32 kernels on the CPU and on eager cards.
        device = self._torch_device
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def feed(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch's images and labels on the device; if possible, copy the next batch during a step."""
        for batch in batches:
            yield self.move(batch.images, batch.labels)

    @property
    def times_steps(self) -> bool:
        """Whether the marks between steps tell how long each took, rather than how long it took to submit it."""
        return self.is_host or self._card_api is not None

    def mark(self) -> Any:
        """Record a timestamp on the device's clock without synchronising; on the host's if the device has none."""
        if self._card_api is None:
            return time.perf_counter()
        event = self._card_api.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """Return the seconds between two marks; synchronise the device before calling this method."""
        return later - earlier if self._card_api is None else earlier.elapsed_time(later) / 1000

    def autocast(self) -> ContextManager[Any]:
        """Context manager for the forward pass: mixed precision, if requested."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return self._autocast(dtype=getattr(torch, self.amp_dtype))

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Move the model to the device; return it wrapped to average gradients over the ranks, and the bare model."""
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
        wrap = DistributedDataParallel if self.compiled else parallel_without_compiler
        self._parallel = wrap(network, device_ids=device_ids, **options)
        return self._compiled(self._parallel), network

    def _compiled(self, model: nn.Module) -> nn.Module:
        if not self.compiled:
            return model
        use_private_temporary_folder()  # the compiler stores code there and loads what it finds
        return torch.compile(model)  # type: ignore[return-value]

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of ``loss``, scaled if the precision requires it."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    @torch.no_grad()
    def average_gradients(self, model: nn.Module) -> None:
        """With --timers: average the gradients over the ranks after the backward pass, not during it."""
        if not self._averages_separately:
            return
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        sum_over_ranks(*gradients)
        for gradient in gradients:
            gradient /= self.world_size

    def step(self, optimizer: Optimizer, model: nn.Module, outputs: Sequence[Tensor]) -> None:
        """Perform one optimizer step; ``outputs`` are the tensors that will be read after it."""
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    def loss_scale(self) -> Tensor | float:
        """Return the loss scale as a tensor on the device, or 1 without a scaler; ``step`` unscales the gradients."""
        return 1.0 if self._scaler is None else self._scaler._scale

    def scaler_state(self) -> dict[str, Any]:
        """The state of the loss scaler, for a checkpoint; reads from the device. Empty without a loss scaler."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Restore the loss scaler from a checkpoint, if this run uses one. Raises UserError if it is damaged."""
        if self._scaler is None or not state:
            return
        saved: dict[str, Any] = state if isinstance(state, dict) else {}
        values: list[Any] = [saved.get(name) for name in self._scaler.state_dict()]
        if not all(type(value) in (int, float) and 0 <= value < 2**53 for value in values) or not state["scale"]:
            raise UserError("is damaged (loss scale)")
        self._scaler.load_state_dict(state)

    def flush(self, tensors: Sequence[Tensor]) -> None:
        """On a lazy device, which only records operations, compute these tensors now; on others, do nothing."""

    def fetch(self, tensor: Tensor) -> list[float]:
        """Return a one-dimensional tensor as a list; waits for the device.

        The training loop reads values from the device only through this method.
        """
        return tensor.cpu().tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, on the device; it is moved there if necessary."""
        tensor = tensor.to(self._torch_device)
        if self.world_size > 1:
            tensor = tensor.clone()
            self._sum_over_ranks(tensor)
        return tensor

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        sum_over_ranks(tensor)

    def draw_seed(self) -> int:
        """Return a random seed, the same on all ranks.

        Rank 0 draws it and shares it through a sum over the ranks, to which the other ranks contribute 0.
        """
        seed = random.SystemRandom().randrange(MAX_RANDOM_SEED) if self.rank == 0 else 0
        return int(self.fetch(self.sum(torch.tensor([float(seed)])))[0])

    def broadcast(self, text: str) -> str:
        """Return rank 0's text, of at most ``MAX_PATH_BYTES``, on every rank.

        It is shared through a sum of its byte values over the ranks, to which the other ranks contribute 0.
        """
        encoded = text.encode() if self.rank == 0 else b""
        codes = torch.tensor([float(code) for code in encoded.ljust(MAX_PATH_BYTES, b"\0")])
        return bytes(int(code) for code in self.fetch(self.sum(codes))).rstrip(b"\0").decode()

    def true_on_all_ranks(self, condition: bool) -> bool:
        """Return whether a condition is true on every rank."""
        return self.fetch(self.sum(torch.tensor([float(not condition)])))[0] == 0

    def seed(self, seed: int) -> None:
        """Seed every random number generator that training uses."""
        random.seed(seed)
        torch.manual_seed(seed)  # also seeds the generator of every card

    def describe(self) -> dict[str, Any]:
        """Describe the device for ``env.json``: hardware, precision, modes, versions, and whether it is simulated."""
        return {
            "device": self.kind,
            "hardware": self._hardware(),
            "num_cpus": os.cpu_count(),
            "num_threads": torch.get_num_threads(),
            "amp_dtype": self.amp_dtype,
            "tf32": self.tf32,
            "simulated": self.is_simulated,
            **{field: getattr(self, field) for name, field in MODES.items() if name in self.supports},
            **({"versions": self._versions} if self._versions else {}),
        }

    def _hardware(self) -> str:
        """Return the name of the hardware."""
        raise NotImplementedError

    def usage(self) -> dict[str, Any]:
        """Resources used so far, for the last event of the run: ``peak_bytes`` of device memory, if known."""
        if self.is_host:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process; in KiB, but in bytes on macOS
            return {"peak_bytes": peak if sys.platform == "darwin" else peak * 1024}
        return {} if self._card_api is None else {"peak_bytes": self._card_api.max_memory_allocated()}
