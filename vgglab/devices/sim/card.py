"""The state of the simulated cards of this process."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

CARDS_VARIABLE = "VGGLAB_SIM_CARDS"
DEFAULT_CARDS = 8
KEEP_64_BITS_VARIABLE = "TORCH_GCU_ENABLE_INT64_AND_UINT64"  # the vendor's opt-in for integers; float64 stays float32
NARROW_TYPES = {
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}
FORK_MESSAGE = (
    "Cannot re-initialize GCU in forked subprocess. To use GCU with multiprocessing, "
    "you must use the 'spawn' start method"
)


class State:
    """The state that ``torch.gcu`` reports. Sizes are in bytes, with one entry per card."""

    def __init__(self) -> None:
        self.current = 0
        self.is_initialized = False
        self.is_forked_child = False
        self.num_host_reads = 0
        self.allocated: dict[int, int] = {}
        self.peak: dict[int, int] = {}
        self.storages: dict[int, int] = {}  # storage address -> number of tensors that use it
        self.generators: dict[int, torch.Generator] = {}
        self.warned_types: set[torch.dtype] = set()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self.is_forked_child = self.is_initialized

    def lazy_init(self) -> None:
        """Record that this process uses a card. Raises RuntimeError in a forked child of such a process."""
        if self.is_forked_child:
            raise RuntimeError(FORK_MESSAGE)
        self.is_initialized = True

    def generator(self, card: int) -> torch.Generator:
        if card not in self.generators:
            self.generators[card] = torch.Generator()
            self.generators[card].manual_seed(torch.initial_seed())
        return self.generators[card]


state = State()


def num_cards() -> int:
    """Return the number of visible cards: ``VGGLAB_SIM_CARDS``, as limited by ``TOPS_VISIBLE_DEVICES``."""
    text = os.environ.get(CARDS_VARIABLE, str(DEFAULT_CARDS))
    if not text.isdigit() or int(text) > 64:
        raise ValueError(f"{CARDS_VARIABLE}={text} is not a whole number from 0 to 64")
    visible = os.environ.get("TOPS_VISIBLE_DEVICES")
    if visible is None:
        return int(text)
    names = [name.strip() for name in visible.split(",")]
    if len(set(names)) < len(names):
        return 0  # if a card is named twice, no card is visible
    count = 0
    for name in names:
        if not name.isdigit() or int(name) >= int(text):
            break  # a negative or unknown entry ends the list
        count += 1
    return count


def check_card(index: int) -> int:
    """Return ``index``. Raises RuntimeError if there is no such card."""
    if not 0 <= index < num_cards():
        raise RuntimeError(f"invalid device ordinal: gcu:{index}; {num_cards()} GCU cards are visible")
    return index


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether the card stores this 64-bit type in 32 bits."""
    if dtype in (torch.int64, torch.uint64):
        return os.environ.get(KEEP_64_BITS_VARIABLE, "false") not in ("true", "1")
    return dtype in NARROW_TYPES


def narrow_(values: torch.Tensor) -> None:
    """Reduce 64-bit values to what 32 bits can hold, in place; warn once per type."""
    if not is_narrow(values.dtype):
        return
    if values.dtype not in state.warned_types:
        state.warned_types.add(values.dtype)
        narrow_type = str(NARROW_TYPES[values.dtype]).replace("torch.", "")
        warnings.warn(
            f"GCU stores {str(values.dtype).replace('torch.', '')} as {narrow_type}: the extra bits are lost "
            "(expected on this card; shown once)",
            stacklevel=2,
        )
    values.copy_(values.to(NARROW_TYPES[values.dtype]))


class CardStorage:
    """The storage of a tensor on a card; its memory is released with the last reference."""

    __slots__ = ("address", "card", "num_bytes", "values")

    def __init__(self, values: torch.Tensor, card: int) -> None:
        self.values, self.card = values, card
        storage = values.untyped_storage()
        self.address = storage._cdata
        self.num_bytes = storage.nbytes() // (2 if is_narrow(values.dtype) else 1)
        state.storages[self.address] = state.storages.get(self.address, 0) + 1
        if state.storages[self.address] == 1:
            total = state.allocated.get(card, 0) + self.num_bytes
            state.allocated[card] = total
            state.peak[card] = max(total, state.peak.get(card, 0))

    def __del__(self) -> None:
        # A tracer's tensor has no values. When Python exits, this module's names may be cleared before its objects.
        if state is None or not hasattr(self, "num_bytes"):
            return
        state.storages[self.address] -= 1
        if state.storages[self.address] == 0:
            del state.storages[self.address]
            state.allocated[self.card] -= self.num_bytes


def with_card_generator(card: int, function: Any) -> Any:
    """Call ``function`` with the card's random number generator instead of the CPU's."""
    card_generator, cpu_generator = state.generator(card), torch.default_generator
    cpu_state = cpu_generator.get_state()
    cpu_generator.set_state(card_generator.get_state())
    try:
        return function()
    finally:
        card_generator.set_state(cpu_generator.get_state())
        cpu_generator.set_state(cpu_state)
