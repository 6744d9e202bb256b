"""The interface between the trainer and the hardware."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, ContextManager, Iterable, Iterator, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab.devices import DeviceOptions
from vgglab.errors import UserError


class Device(ABC):
    """One card (or the CPU) as used by one process, and the rank of that process.

    Attributes:
        kind: the name of the device in ``config.json`` and in the report.
        rank, local_rank, world_size: index of this process among all, its index among those on its machine, and
            the number of processes.
        worker_start: how loader workers are started (``fork`` or ``spawn``).
        pins_memory: whether the loader pins memory, so that copies overlap with computation.
        sampler: the class that distributes the indices of an epoch over the ranks; created with
            ``(indices, num_replicas=, rank=, shuffle=False)``, and ``set_epoch`` is called once per epoch.
        amp_dtype: the data type of mixed precision; ``None`` for full float32.
        tf32: whether float32 matrix products may be computed in TF32.
        channels_last: whether the channels-last (NHWC) memory layout is used.
        fuses: whether the optimizer should use one kernel per step.
        compiles: whether the network is compiled.
        can_average: whether weights may be read outside the step, for a moving average.
        is_host: whether the device is the CPU, so that reading a value needs no synchronisation.
        is_simulated: whether the card is simulated; if it is, its speed means nothing.
        num_cards: number of cards visible to this process; None on the CPU, which any number of ranks can share.
        supports: which of ``channels_last``, ``fused`` and ``compile`` the device supports; the others are refused.
        warnings: messages for the user, one line each.
    """

    kind: str
    worker_start: str
    pins_memory: bool
    sampler: type[Any]
    amp_dtype: str | None
    tf32: bool = False
    channels_last: bool = False
    fuses: bool = False
    compiles: bool = False
    can_average: bool = True
    is_host: bool = False
    is_simulated: bool = False
    num_cards: int | None = None
    supports: frozenset[str] = frozenset()
    _scaler: Any = None  # the loss scaler, if float16 needs one

    def __init__(self, options: DeviceOptions) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.world_size = int(os.environ.get("WORLD_SIZE", options.world_size))
        self.warnings: list[str] = []
        self._options = options
        for name in ("channels_last", "fused", "compile"):
            if getattr(options, name) and name not in self.supports:
                raise UserError(f"--{name.replace('_', '-')}: not supported on {self.kind}; leave it out")
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

    @abstractmethod
    def open(self) -> None:
        """Select the card and join the other ranks."""

    @abstractmethod
    def close(self) -> None:
        """Leave the process group."""

    @abstractmethod
    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Move the batch to the device and convert its types; ``images`` are uint8, ``(N, S, S, 3)``."""

    def feed(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch's images and labels on the device; if possible, copy the next batch during a step."""
        for batch in batches:
            yield self.move(batch.images, batch.labels)

    @abstractmethod
    def mark(self) -> Any:
        """Record a timestamp on the device's clock without synchronising; on the host's if the device has none."""

    @abstractmethod
    def seconds_between(self, earlier: Any, later: Any) -> float:
        """Return the seconds between two marks; synchronise the device before calling this method."""

    @abstractmethod
    def autocast(self) -> ContextManager[Any]:
        """Context manager for the forward pass: mixed precision, if requested."""

    @abstractmethod
    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Move the model to the device; return it wrapped to average gradients over the ranks, and the bare model."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of ``loss``, scaled if the precision requires it."""

    def average_gradients(self, model: nn.Module) -> None:  # noqa: B027  # most have nothing to do here
        """With --timers: average the gradients over the ranks after the backward pass, not during it."""

    @abstractmethod
    def step(self, optimizer: Optimizer, model: nn.Module, outputs: Sequence[Tensor]) -> None:
        """Perform one optimizer step; ``outputs`` are the tensors that will be read after it."""

    def loss_scale(self) -> Tensor | float:
        """Return the scale of the loss, and of its gradients until ``step``: on the device, or 1 without a scaler."""
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

    @abstractmethod
    def flush(self, tensors: Sequence[Tensor]) -> None:
        """On a lazy device, which only records operations, compute these tensors now; on others, do nothing."""

    @abstractmethod
    def fetch(self, tensor: Tensor) -> list[float]:
        """Return a one-dimensional tensor as a list; waits for the device.

        The training loop reads values from the device in no other way.
        """

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, on the device; it is moved there if necessary."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed every random number generator that training uses."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe what is used, for ``env.json``: hardware, precision, and whether the card is simulated."""

    @abstractmethod
    def usage(self) -> dict[str, Any]:
        """Resources used so far, for the last event of the run: ``peak_bytes`` of device memory, if known."""
