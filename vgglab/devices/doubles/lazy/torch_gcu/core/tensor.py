"""A tensor on the card: recorded, and computed only when a flush requests it. (The double computes it at once.)

``done`` tensors have a value: inputs, weights, and the outputs of a flush. All others are pending. Reading a pending
tensor splits the step in two; reading it after a flush that did not include it recomputes it.
"""

import torch

from torch_gcu.core.contract import log

Plain = torch._C.DisableTorchFunction  # within it, tensors are ordinary CPU tensors
READS = {"item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "equal"}
READS |= {"__repr__", "__str__", "__format__"}
FREE = {"backward", "register_hook", "requires_grad_", "retain_grad", "size", "dim", "numel", "is_floating_point"}
MIXES = {"copy_", "__set__", "__get__", "backward", "__getitem__", "__setitem__"}


class LazyTensor(torch.Tensor):
    """A tensor on ``xla:<card>``."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return carry_out(func, args, kwargs or {})


class LazyParameter(torch.nn.Parameter):
    """A weight on ``xla:<card>``."""

    __torch_function__ = LazyTensor.__torch_function__

    @staticmethod
    def __new__(cls, data, requires_grad=True):
        return torch.Tensor._make_subclass(cls, data, requires_grad)


def is_on_card(value):
    return isinstance(value, (LazyTensor, LazyParameter))


def to_card(tensor, card):
    """The result of ``.to("xla:0")``: an input, which already has its value."""
    with Plain():
        moved = tensor.clone() if tensor.requires_grad else tensor.detach().clone()
        moved = moved.as_subclass(LazyTensor)
    return settle(moved, card)


def parameter_to_card(parameter, card):
    with Plain():
        moved = LazyParameter(parameter.detach().clone(), parameter.requires_grad)
    return settle(moved, card)


def settle(tensor, card=None):
    """Mark the tensor as computed."""
    tensor._done, tensor._tainted, tensor._window = True, False, log.window
    if card is not None:
        tensor._card = card
    return tensor


def card_of(tensor):
    return getattr(tensor, "_card", 0)


def carry_out(func, args, kwargs):
    name = getattr(func, "__name__", str(func))
    if func == torch.Tensor.device.__get__:
        return torch.device("xla", card_of(args[0]))
    if name == "is_gcu":
        return True
    if name == "backward":
        log.part_of_step("backward")
    if name == "to":
        return _to(args, kwargs)
    if name in READS:
        read(args[0], name)
    operands = [value for value in _leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    if name not in MIXES:
        _refuse_mixing(operands)
    with Plain():
        if name == "cross_entropy" and args[1].dtype is torch.int32:
            args = (args[0], args[1].long(), *args[2:])  # the card takes int32 labels, the CPU does not
        result = args[0].clone() if name == "cpu" else func(*args, **kwargs)
    if name in READS or name in FREE:
        return result
    return _map(lambda value: _recorded(value, operands), result)


def _recorded(value, operands):
    """Return a result as a pending tensor on the card; ``operands`` are the tensors it depends on."""
    on_card = [tensor for tensor in operands if is_on_card(tensor)]
    if is_on_card(value):  # changed in place: its new value is pending
        result = value
    else:
        with Plain():
            result = value.as_subclass(LazyTensor)
    result._card = card_of(on_card[0])
    result._done = False
    result._window = log.window
    known = [tensor for tensor in on_card if hasattr(tensor, "_done")]
    result._tainted = any(t._tainted or (not t._done and t._window < log.window) for t in known)
    with Plain():
        if result.requires_grad and not result.is_leaf:
            log.is_training = True
    return result


def read(tensor, how):
    """Read a value on the host: free if it was an output of its step, otherwise a graph break."""
    log.call("read", how=how)
    if getattr(tensor, "_done", True):
        return
    if tensor._tainted or tensor._window < log.window:
        log.graph_break(f"{how}() of a tensor that was not among the outputs of its step: it is computed again")
    elif log.is_training or log.step:
        log.graph_break(f"{how}() between the forward pass and the flush: the step is split into two graphs")
    else:
        log.num_graphs += 1  # outside a step, a read runs all pending operations, as in the vendor's evaluation
    settle(tensor)


def _to(args, kwargs):
    tensor, *where = args
    device = target_device(where, kwargs)
    if device is not None and device.type == "cpu":
        read(tensor, "to('cpu')")
        with Plain():
            return tensor.clone()
    others = [value for value in where if not _is_device(value)]
    rest = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
    if not others and not rest:
        return tensor
    with Plain():
        result = original_to(tensor, *others, **rest)
    return _recorded(result, [tensor])


original_to = torch.Tensor.to


def target_device(args, kwargs):
    """The device in the arguments of ``.to(...)``, if there is one."""
    wanted = kwargs.get("device", next((value for value in args if _is_device(value)), None))
    if isinstance(wanted, (str, torch.device)):
        return torch.device(wanted)
    with Plain():
        other = next((value for value in args if isinstance(value, torch.Tensor)), None)
    return None if other is None else other.device


def _is_device(value):
    return isinstance(value, (str, torch.device))


def _refuse_mixing(operands):
    on_card = any(is_on_card(tensor) for tensor in operands)
    strangers = [tensor for tensor in operands if not is_on_card(tensor) and tensor.dim() > 0]
    if on_card and strangers:
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
