"""Adapter for cpu, cuda and mps, using plain PyTorch."""

from __future__ import annotations

import contextlib
import inspect
import platform
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, Iterable, Iterator, TypeVar

import torch
from torch import Tensor, nn

from vgglab.devices import AMP_DTYPES, DeviceOptions
from vgglab.devices.base import LOSS_SCALER, Device
from vgglab.devices.compat import without_compiler
from vgglab.errors import UserError

Item = TypeVar("Item")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
NOT_FOUND = {"cuda": "PyTorch finds no CUDA device", "mps": "PyTorch finds no Metal device"}
SUPPORTED_AMP_DTYPES = {"cpu": ("bfloat16",), "cuda": AMP_DTYPES, "mps": ()}


def why_unavailable(kind: str, options: DeviceOptions) -> str | None:
    """Return None if this machine has a device of this kind, otherwise "", because the reason is obvious."""
    mps = getattr(torch.backends, "mps", None)  # torch >= 1.12
    card_api = {"cpu": None, "cuda": torch.cuda, "mps": mps}[kind]
    is_available = kind == "cpu" or (card_api is not None and card_api.is_available())
    return None if is_available else ""


def open_adapter(kind: str, options: DeviceOptions) -> NativeDevice:
    """Return the adapter. Raises UserError if the device is unavailable or an option is not supported."""
    return NativeDevice(kind, options)


class NativeDevice(Device):
    """A device that PyTorch supports natively: cpu, cuda or mps."""

    supports = frozenset({"channels_last", "fused", "compile"})
    worker_start = "fork"  # workers use CPU tensors only, and a forked worker does not have to import torch again

    def __init__(self, kind: str, options: DeviceOptions) -> None:
        self.kind = kind
        self.amp_dtypes = SUPPORTED_AMP_DTYPES[kind]
        if kind == "cuda":
            self.supports = self.supports | {"tf32"}
        super().__init__(options)
        self.pins_memory = kind == "cuda"
        self.is_host = kind == "cpu"
        self._check()
        if options.fast and options.amp_dtype is None:
            self.amp_dtype = _fast_dtype(kind)
        self.fused = self.fused and _can_fuse(kind)  # --fast requests it without knowing whether this torch can
        self._scaler = _loss_scaler() if self.amp_dtype == "float16" else None
        self._autocast = partial(torch.autocast, kind)
        self._versions = {}
        self._backend = BACKENDS.get(kind, "")
        self._torch_device = torch.device(kind, self.local_rank) if kind == "cuda" else torch.device(kind)
        self._card_api = torch.cuda if kind == "cuda" else None
        if kind == "cuda":
            # Here, not in open(), so that the benchmark's plain loop uses the same precision. The defaults for matrix
            # products and convolutions differ. This is the older of torch's two interfaces: torch.compile reads it, and
            # raises an error if the newer one (torch 2.9) was used to set TF32.
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            torch.backends.cudnn.allow_tf32 = self.tf32

    def _check(self) -> None:
        amp_dtype = self._options.amp_dtype
        if why_unavailable(self.kind, self._options) is not None:
            raise UserError(f"--device {self.kind}: {NOT_FOUND[self.kind]}; use auto or cpu")
        if self.kind != "cpu":
            self._set_num_cards(torch.cuda.device_count() if self.kind == "cuda" else 1)
        if self._options.tf32 and torch.cuda.get_device_capability() < (8, 0):
            card = torch.cuda.get_device_name()
            raise UserError(f"--tf32: not supported by {card}; leave it out to train in float32")
        if amp_dtype == "bfloat16" and self.kind == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError(f"--amp-dtype bfloat16: not supported by {torch.cuda.get_device_name()}; use float16")
        if amp_dtype is not None and self.kind == "cpu" and not _cpu_supports_bfloat16_pooling():
            raise UserError(f"--amp: torch {torch.__version__} has no bfloat16 kernels for the CPU; leave it out")
        if self._options.fused and not _can_fuse(self.kind):
            raise UserError(f"--fused: torch {torch.__version__} has no fused optimizer on {self.kind}; leave it out")
        if self._options.compile and not hasattr(torch, "compile"):
            raise UserError(f"--compile: torch {torch.__version__} has no compiler; leave it out")
        if self.world_size > 1 and self.kind not in BACKENDS:
            raise UserError(f"--device {self.kind}: supports one process only")

    def feed(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        if self.kind != "cuda":
            yield from super().feed(batches)
            return
        copy_stream = torch.cuda.Stream()

        def copy(batch: Any) -> tuple[Tensor, Tensor]:
            with torch.cuda.stream(copy_stream):
                return self.move(batch.images, batch.labels)

        for images, labels in prefetch(map(copy, batches)):
            torch.cuda.current_stream().wait_stream(copy_stream)
            for tensor in (images, labels):
                tensor.record_stream(torch.cuda.current_stream())  # its memory stays reserved until this stream is done
            yield images, labels

    def _hardware(self) -> str:
        return torch.cuda.get_device_name() if self.kind == "cuda" else _cpu_name()


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items unchanged, requesting each one before its predecessor is yielded."""
    queue: deque[Item] = deque()
    for item in items:
        queue.append(item)
        if len(queue) > 1:
            yield queue.popleft()
    yield from queue


def _fast_dtype(kind: str) -> str | None:
    """Return the fastest data type for mixed precision; None on mps, and on a CPU without fast bfloat16."""
    if kind == "cuda":
        # Not is_bf16_supported(), which newer versions also answer with True for cards that only emulate bfloat16.
        has_bfloat16 = torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
        return "bfloat16" if has_bfloat16 else "float16"
    is_fast = kind == "cpu" and _cpu_has_bfloat16_instructions() and _cpu_supports_bfloat16_pooling()
    return "bfloat16" if is_fast else None


def _cpu_has_bfloat16_instructions() -> bool:
    """Whether the CPU has AVX-512 BF16 or AMX, which multiply bfloat16 in hardware (Linux; elsewhere False)."""
    flags = _cpu_info()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _can_fuse(kind: str) -> bool:
    if "fused" not in inspect.signature(torch.optim.SGD).parameters:  # torch >= 2.3
        return False
    weight = torch.zeros(1, device=kind, requires_grad=True)
    try:
        without_compiler(torch.optim.SGD)([weight], lr=0.1, fused=True)
    except RuntimeError:
        return False
    return True


def _cpu_supports_bfloat16_pooling() -> bool:
    """Whether this torch supports bfloat16 max pooling on the CPU; torch 1.10 does not."""
    try:
        nn.functional.max_pool2d(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), 2)
    except RuntimeError:
        return False
    return True


def _loss_scaler() -> Any:
    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):  # torch >= 2.3
        return torch.amp.GradScaler("cuda", **LOSS_SCALER)
    return torch.cuda.amp.GradScaler(**LOSS_SCALER)


def _cpu_name() -> str:
    names = [line for line in _cpu_info().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _cpu_info() -> str:
    """What Linux says about the CPU; elsewhere an empty string."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return ""
