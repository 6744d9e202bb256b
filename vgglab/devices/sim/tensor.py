"""The tensor of a simulated card, and how operations on it are computed."""

# mypy: disable-error-code="override,assignment"

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from vgglab.devices.sim.card import CardStorage, check_card, is_narrow, narrow_, state, with_card_generator

aten = torch.ops.aten
# Operations that accept tensors on different devices, as on real cards.
MIXED_OPS = {
    aten._to_copy.default, aten.copy_.default, aten._copy_from.default, aten.index.Tensor, aten.index_put_.default,
}  # fmt: skip
# Operations that return a value, or a shape that depends on values, to the host.
HOST_READ_OPS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
SHAPE_CHANGING_OPS = {aten.resize_.default, aten.set_.source_Tensor, aten.t_.default, aten.transpose_.default}
SHAPE_CHANGING_OPS |= {aten.squeeze_.default, aten.squeeze_.dim, aten.unsqueeze_.default, aten.swapaxes_.default}
REDUCTIONS = {aten.sum.default, aten.sum.dim_IntList, aten.cumsum.default, aten.prod.default}
MATMULS = {aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default}
CPU = torch.device("cpu")


class SimTensor(torch.Tensor):
    """A tensor on ``gcu:<card>``, backed by a CPU tensor of the same shape, strides and type."""

    _card_storage: CardStorage

    @staticmethod
    def __new__(cls, values: torch.Tensor, card: int) -> SimTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=torch.device("gcu", card),
        )
        tensor._card_storage = CardStorage(values, card)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(op, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        text = repr(self.detach().cpu())[:-1]
        gradient = ", requires_grad=True" if self.requires_grad else ""
        return f"{text}, device='{self.device}'{gradient})"

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert a tensor on gcu to numpy; use Tensor.cpu() to copy it to host memory first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a CPU tensor, which can be read without a card."""
        host = self.detach().cpu()
        return (torch.nn.Parameter(host) if isinstance(self, torch.nn.Parameter) else host).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Any:
        if not self.is_leaf:
            raise RuntimeError("deepcopy supports only tensors created by the user, not results of operations")
        with torch.no_grad():
            copy: Any = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy


class Hook(torch._C._acc.PrivateUse1Hooks):
    """The hooks that PyTorch's core calls on a backend."""

    def is_available(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class Guard(torch._C._acc.DeviceGuard):
    """The device guard of the PrivateUse1 key; ``torch.gcu.set_device`` selects cards."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


_libraries: list[torch.library.Library] = []  # keeps the registrations alive


def register() -> None:
    """Register ``execute`` for all operations of the PrivateUse1 key, mainly for factory functions."""
    all_ops = torch.library.Library("_", "IMPL")
    all_ops.fallback(lambda op, *args, **kwargs: execute(op, args, kwargs), "PrivateUse1")
    aten_library = torch.library.Library("aten", "IMPL")
    # torch.tensor(..., device="gcu") calls this operation without __torch_dispatch__ and without the fallback.
    aten_library.impl("_copy_from", _copy_from, "PrivateUse1")
    _libraries.extend([all_ops, aten_library])
    torch.serialization.register_package(0, lambda storage: None, _reject_location)


def _reject_location(storage: Any, location: str) -> None:
    if location.startswith("gcu"):
        raise NotImplementedError("cannot load to the simulated card; use map_location='cpu', then move the tensors")


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return execute(aten.copy_.default, (target, source, non_blocking), {})


def execute(op: Any, args: tuple, kwargs: dict) -> Any:
    """Compute one operation on the CPU, following the rules of the card."""
    state.lazy_init()
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    card_tensors = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    if op not in MIXED_OPS:
        _check_same_device(tensors)
    if op in SHAPE_CHANGING_OPS:
        raise NotImplementedError(f"{op} changes a tensor's shape in place, which the simulated card does not support")
    _check_supported(op, args, kwargs)
    card, returns_to_host = _result_device(op, card_tensors, args, kwargs.get("device"))
    if card_tensors and (returns_to_host or op in HOST_READ_OPS):
        state.num_host_reads += 1

    original_tensors = {id(tensor._card_storage.values): tensor for tensor in card_tensors}
    args, kwargs = pytree.tree_map(_to_cpu, (args, dict(kwargs)))
    if torch.Tag.nondeterministic_seeded in op.tags:
        _check_generator(kwargs)
        result = with_card_generator(card, lambda: _run(op, args, kwargs))
    else:
        result = _run(op, args, kwargs)
    if returns_to_host:
        return result

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not op.is_view:
            narrow_(value)
        return original_tensors[id(value)] if id(value) in original_tensors else SimTensor(value, card)

    return pytree.tree_map(wrap, result)


def _check_same_device(tensors: list[torch.Tensor]) -> None:
    """Raise an error for tensors on different devices; as on real cards, CPU scalars are allowed."""
    devices = {str(tensor.device) for tensor in tensors if isinstance(tensor, SimTensor) or tensor.dim() > 0}
    if len(devices) > 1:
        first, second = sorted(devices, reverse=True)[:2]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}!"
        )


def _check_supported(op: Any, args: tuple, kwargs: dict) -> None:
    """Raise an error for operations that a metric might use, but that the vendor lists as unsupported."""
    if op is aten.topk.default and (kwargs.get("sorted", args[4] if len(args) > 4 else True)) is False:
        raise RuntimeError("topk with sorted=False is not supported on GCU")
    dtype = kwargs.get("dtype")
    if op in REDUCTIONS and dtype is not None and args[0].is_floating_point() and dtype != args[0].dtype:
        raise RuntimeError(
            f"{op} from {args[0].dtype} to {dtype} is not supported on GCU; cast first, e.g. with .float()"
        )


def _check_generator(kwargs: dict) -> None:
    if kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'gcu' device type for generator but found 'cpu'")


def _result_device(op: Any, card_tensors: list[SimTensor], args: tuple, device: Any) -> tuple[int, bool]:
    """Return the card of the result, and whether the result goes to the host instead."""
    if device is not None:
        device = torch.device(device)
        if device.type != "gcu":
            return 0, True
        return check_card(state.current if device.index is None else device.index), False
    if op is aten.copy_.default:
        target = args[0]
        return (target.device.index, False) if isinstance(target, SimTensor) else (0, True)
    return (card_tensors[0].device.index if card_tensors else state.current), False


def _to_cpu(value: Any) -> Any:
    if isinstance(value, SimTensor):
        return value._card_storage.values
    return CPU if isinstance(value, torch.device) and value.type == "gcu" else value


def _run(op: Any, args: tuple, kwargs: dict) -> Any:
    kernel = OVERRIDES.get(op, op)
    if op in MATMULS and any(isinstance(value, torch.Tensor) and value.dtype is torch.float16 for value in args):
        # As on cards, float16 products are summed in float32. Also, float16 on the CPU is very slow.
        result = kernel(*[_cast(value, torch.float16, torch.float32) for value in args], **kwargs)
        return pytree.tree_map(lambda value: _cast(value, torch.float32, torch.float16), result)
    return kernel(*args, **kwargs)


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    return value.to(target) if isinstance(value, torch.Tensor) and value.dtype is source else value


def _dropout(images: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply dropout in one kernel, like a card, but in the CPU's order of operations; results match the CPU's."""
    if not train or p == 0:
        return images.clone(), torch.ones_like(images, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(images), torch.zeros_like(images, dtype=torch.bool)
    mask = torch.empty_like(images).bernoulli_(1 - p)
    return images * mask.div(1 - p), mask.bool()


def _dropout_backward(gradient: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return gradient * mask.to(gradient.dtype).div(1 / scale) if scale else torch.zeros_like(gradient)


def _fill_(values: torch.Tensor, value: float) -> torch.Tensor:
    """Fill in place; as on the card, a number too large for the 32-bit type is clamped, not wrapped."""
    if values.dtype is torch.int64 and is_narrow(values.dtype):
        value = max(-(2**31), min(2**31 - 1, int(value)))
    return values.fill_(value)


OVERRIDES: dict[Any, Any] = {
    aten.native_dropout.default: _dropout,
    aten.native_dropout_backward.default: _dropout_backward,
    aten.fill_.Scalar: _fill_,
}
