"""The double of ``torch_gcu.core.device``."""

import contextlib
import os

import torch

_current = [0]


def device_count():
    return int(os.environ.get("VGGLAB_DOUBLE_CARDS", "8"))


def is_available():
    return device_count() > 0


def current_device():
    return _current[0] if is_available() else None


def set_device(device):
    """Select the current card; an index that does not exist is ignored."""
    index = _index(device)
    if 0 <= index < device_count():
        _current[0] = index


def gcu_device(device=None):
    """Return ``torch.device("xla:N")``; without an argument, the current device."""
    index = current_device() if device is None else _index(device)
    if index is None or not 0 <= index < device_count():
        raise IndexError(f"there is no card {index}")
    return torch.device("xla", index)


@contextlib.contextmanager
def device(device):
    """Context manager that selects a card. It is not a device: ``.to(torch_gcu.device(0))`` fails."""
    previous = _current[0]
    set_device(device)
    try:
        yield
    finally:
        _current[0] = previous


def get_device_name(device=None):
    return "contract double of the lazy generation"


def get_version():
    return "contract double"


def _index(device):
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "xla":
        raise ValueError(f"expected a device of type xla, got {device}")
    return _current[0] if device.index is None else device.index
