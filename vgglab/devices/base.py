"""The interface between the trainer and the hardware."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from typing import Any, ContextManager, Iterable, Iterator, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab.devices import DeviceOptions
from vgglab.errors import UserError


class Device(ABC):
    """One card (or the CPU) as seen by one process, and its place among the ranks.

    Attributes:
        kind: the word recorded in ``config.json`` and the report.
        rank, local_rank, world_size: this process among all, among those of its machine, and how many.
        worker_start: how loader workers are started (``fork`` or ``spawn``).
        pins_memory: whether copies from page-locked memory overlap with computing.
        sampler: the class that deals the places of an epoch out to the ranks; made with
            ``(places, num_replicas=, rank=, shuffle=False)``, which gets ``set_epoch`` once an epoch.
        amp_dtype: the type of mixed precision in use; ``None`` for full float32.
        tf32: matrix products of float32 may be computed in TF32.
        channels_last: activations and weights have the channels of a pixel side by side.
        fuses: the optimizer should make its step in one kernel.
        compiles: the network is compiled.
        can_average: weights may be read outside the step, for a moving average of them.
        is_host: it computes on the CPU and in its memory, and a read of its values waits for nothing.
        is_simulated: no card was there, so no speed it shows is a card's.
        num_cards: that this process can see; None on the CPU, which any number of ranks share.
        supports: which of ``channels_last``, ``fused`` and ``compile`` can be asked for; the others are refused.
        warnings: about the device, one line each.
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
    _scaler: Any = None  # of the loss, where float16 needs one

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
                f"--world-size {self.world_size}: no other ranks were started; --nproc {self.world_size} starts them"
            )

    def _take_card_of(self, num_cards: int) -> None:
        """Note how many cards this machine has, and that there is one for this rank. Raises UserError."""
        self.num_cards = num_cards
        if self.local_rank >= num_cards:
            raise UserError(
                f"--nproc: rank {self.rank} needs card {self.local_rank} (counted from 0), this machine has {num_cards}"
            )

    @abstractmethod
    def open(self) -> None:
        """Select the card and join the other ranks."""

    @abstractmethod
    def close(self) -> None:
        """Leave the other ranks."""

    @abstractmethod
    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Move the batch to the device and convert its types; ``images`` are uint8, ``(N, S, S, 3)``."""

    def feed(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of each batch, on the card; where it can, the next travels while one is computed."""
        for batch in batches:
            yield self.move(batch.images, batch.labels)

    def mark(self) -> Any:
        """A timestamp on the device's clock, without synchronising."""
        return time.perf_counter()

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """Seconds between two marks; call it after the device was synchronised."""
        return later - earlier

    @abstractmethod
    def autocast(self) -> ContextManager[Any]:
        """Mixed precision around the forward pass, if it was asked for."""

    @abstractmethod
    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The model on the card: as trained (over several ranks it averages gradients), and the bare network in it."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, scaled if the precision needs it."""

    def average_gradients(self, model: nn.Module) -> None:  # noqa: B027  # most have nothing to do here
        """With --timers, average over the ranks separately from the backward pass, which otherwise hides it."""

    @abstractmethod
    def step(self, optimizer: Optimizer, model: nn.Module, outputs: Sequence[Tensor]) -> None:
        """One optimizer step; ``outputs`` are the tensors that will be read after it."""

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale, for a checkpoint; reads from the card. Empty without one."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Take up the loss scale of a checkpoint, if this run has one. Raises UserError for one that is damaged."""
        if self._scaler is None or not state:
            return
        kept: dict[str, Any] = state if isinstance(state, dict) else {}
        found: list[Any] = [kept.get(name) for name in self._scaler.state_dict()]
        if not all(type(value) in (int, float) and 0 <= value < 2**53 for value in found) or not state["scale"]:
            raise UserError("is damaged (loss scale)")
        self._scaler.load_state_dict(state)

    @abstractmethod
    def flush(self, tensors: Sequence[Tensor]) -> None:
        """Have these computed now, on a card that only records operations; others have done so already."""

    @abstractmethod
    def fetch(self, tensor: Tensor) -> list[float]:
        """The values of a one-dimensional tensor. The only host read in the loop: it waits for the card."""

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all ranks, on the card; one that is not there yet is moved first."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed every generator that training draws from."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was really used, for ``env.json``: hardware, precision, simulated or not."""

    @abstractmethod
    def usage(self) -> dict[str, Any]:
        """What the run has taken of the card so far, for its last event, e.g. ``peak_bytes`` of its memory."""
