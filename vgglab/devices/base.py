"""The interface between the engine and the hardware: eleven verbs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ContextManager, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer


class Device(ABC):
    """One card (or the CPU) as seen by one process, and its place among the ranks.

    Attributes:
        kind: the word recorded in ``config.json`` and the report.
        rank, local_rank, world_size: this process among all, among those of its machine, and how many.
        worker_start: how loader workers are started (``fork`` or ``spawn``).
        pins_memory: whether copies from page-locked memory overlap with computing.
        amp_dtype: the type of mixed precision in use; ``None`` for full float32.
    """

    kind: str
    rank: int
    local_rank: int
    world_size: int
    worker_start: str
    pins_memory: bool
    amp_dtype: str | None

    @abstractmethod
    def open(self) -> None:
        """Select the card and join the other ranks."""

    @abstractmethod
    def close(self) -> None:
        """Leave the other ranks."""

    @abstractmethod
    def move(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch, on the card, in the types it wants."""

    @abstractmethod
    def autocast(self) -> ContextManager[Any]:
        """Mixed precision around the forward pass, if it was asked for."""

    @abstractmethod
    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The model on the card: as trained (over several ranks it averages gradients), and the bare network in it."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, scaled if the precision needs it."""

    @abstractmethod
    def step(self, optimizer: Optimizer, model: nn.Module, outputs: Sequence[Tensor]) -> None:
        """One optimizer step; ``outputs`` are the tensors that will be read after it."""

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
