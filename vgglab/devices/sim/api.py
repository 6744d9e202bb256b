"""``torch.gcu`` of the simulated card: the functions from the vendor's user guide that vgglab and its notebooks use.

Names, arguments and results are those of torch_gcu 2.10 (``torch_gcu/gcu/__init__.py``, ``memory.py``, ``random.py``,
``streams.py``). ``total_memory`` is the memory of this machine.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import ModuleType
from typing import Any, Iterator, NamedTuple

import torch

from vgglab.devices.sim.card import check_card, num_cards, state

IS_SIMULATED = True


class Properties(NamedTuple):
    """The properties of a card. Major version 3 means S60; the processor counts are those that an S60 reports."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    max_threads_per_multi_processor: int
    sip_count: int


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    return num_cards()


def current_device() -> int:
    init()
    return state.current


def set_device(device: Any) -> None:
    """Select the current card. A negative index does nothing; a device object needs an index."""
    if isinstance(device, (str, torch.device)) and torch.device(device).index is None:
        raise ValueError(f"{device}: the card number is missing; use gcu:0, for example")
    index = _index(device)
    if index >= 0:
        state.lazy_init()
        state.current = check_card(index)


@contextlib.contextmanager
def device(device: Any) -> Iterator[None]:
    """Context manager that selects a card within the block."""
    previous = state.current
    set_device(device)
    try:
        yield
    finally:
        state.current = previous


def get_device_name(device: Any = None) -> str:
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    properties = get_device_properties(device)
    return properties.major, properties.minor


def get_device_properties(device: Any = None) -> Properties:
    index = _index(device)
    if not 0 <= index < device_count():
        raise AssertionError(f"Invalid device id {index}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Properties("GCU", 3, 0, 2, memory, 0, 24)


def get_sip_count(device: Any = None) -> int:
    return get_device_properties(device).sip_count


def is_bf16_supported() -> bool:
    return True


def is_fp16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def init() -> None:
    state.lazy_init()
    if device_count() == 0:
        raise RuntimeError("No GCU cards are visible")


def is_initialized() -> bool:
    return state.is_initialized and not state.is_forked_child


def _is_in_bad_fork() -> bool:
    return state.is_forked_child


def synchronize(device: Any = None) -> None:
    """Return at once: every operation has finished when its call returns."""
    init()


def memory_allocated(device: Any = None) -> int:
    return state.allocated.get(_index(device), 0)


def max_memory_allocated(device: Any = None) -> int:
    return state.peak.get(_index(device), 0)


# There is no caching allocator: reserved memory is memory in use.
memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def reset_peak_memory_stats(device: Any = None) -> None:
    state.peak[_index(device)] = memory_allocated(device)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Return ``(free, total)`` in bytes."""
    total = get_device_properties(device).total_memory
    return total - memory_allocated(device), total


def empty_cache() -> None:
    pass


def manual_seed(seed: int) -> None:
    state.generator(state.current).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed all cards; ``torch.manual_seed`` also calls this function."""
    for card in {*range(device_count()), *state.generators}:
        state.generator(card).manual_seed(int(seed))


def initial_seed() -> int:
    return state.generator(state.current).initial_seed()


def get_rng_state(device: Any = "gcu") -> torch.Tensor:
    return state.generator(_index(device)).get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "gcu") -> None:
    state.generator(_index(device)).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(card) for card in range(device_count())]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for card, new_state in enumerate(new_states):
        set_rng_state(new_state, card)


class Event:
    """A timestamp; ``elapsed_time`` returns milliseconds of the host's wall-clock time."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._enable_timing = enable_timing
        self._timestamp: float | None = None

    def record(self, stream: Any = None) -> None:
        self._timestamp = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        if not (self._enable_timing and end._enable_timing):
            raise RuntimeError("both events must be created with enable_timing=True")
        if self._timestamp is None or end._timestamp is None:
            raise RuntimeError("both events must be recorded before elapsed_time is called")
        return 1000 * (end._timestamp - self._timestamp)


def _index(device: Any) -> int:
    """Return the index of a card, given as an index, a name, a device, or None (the current card)."""
    if isinstance(device, int):
        return device
    if device is None:
        return state.current
    device = torch.device(device)
    if device.type != "gcu":
        raise ValueError(f"Expected a gcu device, but got: {device}")
    return state.current if device.index is None else device.index


def _autocast(enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True) -> torch.autocast:
    return torch.autocast("gcu", dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


class GradScaler(torch.amp.GradScaler):
    """Like PyTorch's GradScaler, but the first argument is the scale, not a device."""

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if isinstance(init_scale, str):
            raise TypeError("GradScaler: the first argument is init_scale, a number")
        super().__init__("gcu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)

    def scale(self, outputs: Any) -> Any:
        if isinstance(outputs, torch.Tensor) and outputs.device.type != "gcu":
            raise ValueError(f"the loss must be on gcu, but is on {outputs.device}")
        return super().scale(outputs)


def create_module() -> ModuleType:
    """Create the module ``torch.gcu``, including ``torch.gcu.amp``."""
    import sys

    module, amp = ModuleType("torch.gcu"), ModuleType("torch.gcu.amp")
    for name, value in globals().items():
        if not name.startswith("__") and not isinstance(value, ModuleType):
            setattr(module, name, value)
    amp.autocast, amp.GradScaler = _autocast, GradScaler  # type: ignore[attr-defined]
    module.amp = amp  # type: ignore[attr-defined]
    sys.modules["torch.gcu.amp"] = amp
    return module
