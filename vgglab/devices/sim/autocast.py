"""Mixed precision on the simulated card, using PyTorch's lists of operations for low and full precision."""

from __future__ import annotations

from typing import Any

import torch

KEY = "AutocastPrivateUse1"
# The operations of VGG in the lists of PyTorch's "Autocast Op Reference"; all others keep the type of their inputs.
IN_LOW_PRECISION = "conv2d convolution linear addmm mm matmul bmm baddbmm addbmm".split()
IN_FLOAT32 = "log_softmax.int softmax.int nll_loss nll_loss_nd cross_entropy_loss mse_loss l1_loss".split()
IN_FLOAT32 += "sum sum.dim_IntList prod cumsum exp log pow.Tensor_Scalar norm.Scalar".split()

_libraries: list[torch.library.Library] = []


def register() -> None:
    all_ops = torch.library.Library("_", "IMPL")
    all_ops.fallback(torch.library.fallthrough_kernel, KEY)
    overrides = torch.library.Library("aten", "IMPL")
    for name in IN_LOW_PRECISION:
        overrides.impl(name, _with_cast(name, None), KEY)
    for name in IN_FLOAT32:
        overrides.impl(name, _with_cast(name, torch.float32), KEY)
    _libraries.extend([all_ops, overrides])


def _with_cast(name: str, dtype: torch.dtype | None) -> Any:
    """Return a function that casts float tensors to ``dtype`` (None: autocast's type), then runs the operation."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    without_autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))

    def cast(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(cast(item) for item in value)
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype or torch.get_autocast_dtype("gcu")) if is_float else value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return op(*[cast(value) for value in args], **{key: cast(value) for key, value in kwargs.items()})

    return call
