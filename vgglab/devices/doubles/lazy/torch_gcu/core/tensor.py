"""A tensor on the card: recorded, and computed only when a flush requests it. (The double computes it at once.)

Computed tensors have a value: inputs, weights, and the outputs of a flush. All others are pending. Reading a pending
tensor splits the step in two; reading it after a flush that did not include it recomputes it.
"""

import torch

from torch_gcu.core.contract import log

Plain = torch._C.DisableTorchFunction  # within it, tensors are ordinary CPU tensors
READS = {"item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "equal"}
READS |= {"__repr__", "__str__", "__format__"}
NOT_RECORDED = {
    "backward", "register_hook", "requires_grad_", "retain_grad", "size", "dim", "numel", "is_floating_point",
}  # fmt: skip
MIXED_DEVICE_OPS = {"copy_", "__set__", "__get__", "backward", "__getitem__", "__setitem__"}


class LazyTensor(torch.Tensor):
    """A tensor on ``xla:<card>``."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


class LazyParameter(torch.nn.Parameter):
    """A weight on ``xla:<card>``."""

    __torch_function__ = LazyTensor.__torch_function__

    @staticmethod
    def __new__(cls, data, requires_grad=True):
        return torch.Tensor._make_subclass(cls, data, requires_grad)


def is_on_card(value):
    return isinstance(value, (LazyTensor, LazyParameter))


def to_card(tensor, card):
    """Return a copy of the tensor on the card: an input of the graph, which already has its value."""
    with Plain():
        moved = tensor.clone() if tensor.requires_grad else tensor.detach().clone()
        moved = moved.as_subclass(LazyTensor)
    return mark_computed(moved, card)


def parameter_to_card(parameter, card):
    with Plain():
        moved = LazyParameter(parameter.detach().clone(), parameter.requires_grad)
    return mark_computed(moved, card)


def mark_computed(tensor, card=None):
    """Mark the tensor as computed."""
    tensor._is_computed, tensor._is_stale, tensor._step_number = True, False, log.step_number
    if card is not None:
        tensor._card = card
    return tensor


def card_of(tensor):
    return getattr(tensor, "_card", 0)


def execute(func, args, kwargs):
    name = getattr(func, "__name__", str(func))
    if func == torch.Tensor.device.__get__:
        return torch.device("xla", card_of(args[0]))
    if name == "is_gcu":
        return True
    if name == "backward":
        log.record_step_call("backward")
    if name == "to":
        return _to(args, kwargs)
    if name in READS:
        read(args[0], name)
    operands = [value for value in _leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    if name not in MIXED_DEVICE_OPS:
        _check_same_device(operands)
    log.graph.append((name, *(value for value in _leaves((args, kwargs)) if isinstance(value, (int, float, slice)))))
    with Plain():
        if name == "cross_entropy" and args[1].dtype is torch.int32:
            args = (args[0], args[1].long(), *args[2:])  # the card takes int32 labels, the CPU does not
        result = args[0].clone() if name == "cpu" else func(*args, **kwargs)
    if name in READS or name in NOT_RECORDED:
        return result
    return _map(lambda value: _pending(value, operands), result)


def _pending(value, operands):
    """Return a result as a pending tensor on the card; ``operands`` are the tensors it depends on."""
    on_card = [tensor for tensor in operands if is_on_card(tensor)]
    if is_on_card(value):  # changed in place: its new value is pending
        result = value
    else:
        with Plain():
            result = value.as_subclass(LazyTensor)
    result._card = card_of(on_card[0])
    result._is_computed = False
    result._step_number = log.step_number
    known = [tensor for tensor in on_card if hasattr(tensor, "_is_stale")]  # not a copy of a weight
    result._is_stale = any(t._is_stale or (not t._is_computed and t._step_number < log.step_number) for t in known)
    with Plain():
        if result.requires_grad and not result.is_leaf:
            log.is_training = True
    return result


def read(tensor, how):
    """Record a host read: free if the value is computed, otherwise one more graph, which splits a running step."""
    log.call("read", how=how)
    if getattr(tensor, "_is_computed", True):
        return
    if tensor._is_stale or tensor._step_number < log.step_number:
        log.graph_break(f"{how}() of a tensor that was not among the outputs of its step: it is computed again")
    elif log.is_training or log.step:
        log.graph_break(f"{how}() between the forward pass and the flush: the step is split into two graphs")
    else:
        log.num_graphs += 1  # outside a step, a read runs all pending operations, as in the vendor's evaluation
    mark_computed(tensor)


def _to(args, kwargs):
    tensor, *targets = args
    device = target_device(targets, kwargs)
    if device is not None and device.type == "cpu":
        read(tensor, "to('cpu')")
        with Plain():
            return tensor.clone()
    conversions = [value for value in targets if not _is_device(value)]
    options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
    if not conversions and not options:
        return tensor
    with Plain():
        result = original_to(tensor, *conversions, **options)
    return _pending(result, [tensor])


original_to = torch.Tensor.to


def target_device(args, kwargs):
    """Return the device in the arguments of ``.to(...)``, or None."""
    target = kwargs.get("device", next((value for value in args if _is_device(value)), None))
    if isinstance(target, (str, torch.device)):
        return torch.device(target)
    with Plain():
        other = next((value for value in args if isinstance(value, torch.Tensor)), None)
    return None if other is None else other.device


def _is_device(value):
    return isinstance(value, (str, torch.device))


def _check_same_device(operands):
    on_card = any(is_on_card(tensor) for tensor in operands)
    cpu_tensors = [tensor for tensor in operands if not is_on_card(tensor) and tensor.dim() > 0]
    if on_card and cpu_tensors:
        raise RuntimeError("Input tensor is not an XLA tensor: CPUFloatType; move it with .to(device) first")


def _leaves(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _map(function, value):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields") is False and type(value) is tuple:
        return tuple(_map(function, item) for item in value)
    if type(value) is list:
        return [_map(function, item) for item in value]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):  # torch.return_types
        return type(value)([_map(function, item) for item in value])
    return value
