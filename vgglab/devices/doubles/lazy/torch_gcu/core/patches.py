"""Patches to torch: those that torch_gcu makes on import, and those that let the double check calls."""

import functools
import os

import torch
from torch.nn.parallel import DistributedDataParallel as StockParallel
from torch.utils.data.distributed import DistributedSampler as StockSampler

from torch_gcu.core.contract import log
from torch_gcu.core.device import device_count
from torch_gcu.core.model import allowed_steps
from torch_gcu.core.tensor import is_on_card, original_to, parameter_to_card, target_device, to_card

original_module_to, original_save = torch.nn.Module.to, torch.save


def install():
    torch.Tensor.to = _tensor_to
    torch.Tensor.is_gcu = lambda tensor: is_on_card(tensor)  # a method in this generation
    torch.nn.Module.to = _module_to
    torch.save = _save
    for optimizer in vars(torch.optim).values():
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer) and "step" in vars(optimizer):
            optimizer.step = _checked_step(optimizer.step)
    torch.optim.Optimizer.zero_grad = _checked_zero_grad(torch.optim.Optimizer.zero_grad)
    StockParallel.__init__ = _forbid(StockParallel, "torch_gcu.nn.parallel.DistributedDataParallel")
    StockSampler.__init__ = _forbid(StockSampler, "torch_gcu.utils.data.distributed.DistributedSampler")


@functools.wraps(original_to)  # execute recognises it by its name
def _tensor_to(tensor, *args, **kwargs):
    device = target_device(args, kwargs)
    if not is_on_card(tensor) and device is not None and device.type == "xla":
        return to_card(tensor, device.index or 0)
    return original_to(tensor, *args, **kwargs)


def _module_to(module, *args, **kwargs):
    device = target_device(args, kwargs)
    if device is None or device.type != "xla":
        return original_module_to(module, *args, **kwargs)
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None and not is_on_card(parameter):
                submodule._parameters[name] = parameter_to_card(parameter, device.index or 0)
        for name, buffer in submodule._buffers.items():
            if buffer is not None and not is_on_card(buffer):
                submodule._buffers[name] = to_card(buffer, device.index or 0)
    return module


def _has_card_parameters(optimizer):
    return any(is_on_card(p) for group in optimizer.param_groups for p in group["params"])


def _checked_step(step):
    @functools.wraps(step)
    def checked(optimizer, *args, **kwargs):
        if _has_card_parameters(optimizer) and not allowed_steps:
            log.violation(
                "a bare optimizer.step(): nothing runs on a lazy card until optimizer_step or unlazy is called"
            )
        if _has_card_parameters(optimizer):
            # What the step must keep, by name. An optimizer does not know its parameters' names, so they are numbered.
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            log.required_outputs = {f"parameter {number}": p for number, p in enumerate(parameters)}
        return step(optimizer, *args, **kwargs)

    return checked


def _checked_zero_grad(zero_grad):
    @functools.wraps(zero_grad)
    def checked(optimizer, set_to_none=False):
        if _has_card_parameters(optimizer):
            log.record_step_call("zero_grad", set_to_none=set_to_none)
            if not set_to_none:
                log.violation("zero_grad() keeps the gradients in the graph; the vendor's loop calls zero_grad(True)")
        return zero_grad(optimizer, set_to_none=set_to_none)

    return checked


def _forbid(stock, replacement):
    original = stock.__init__

    @functools.wraps(original)
    def checked(self, *args, **kwargs):
        if type(self) is stock and device_count() > 0:  # without a card, training on the CPU is allowed
            log.violation(f"torch's own {stock.__name__} does not work on a lazy card; use {replacement}")
        original(self, *args, **kwargs)

    return checked


def _save(content, *args, **kwargs):
    if _contains_card_tensors(content):
        log.violation("torch.save of a tensor on the card: loading it needs torch_gcu; save a copy made with .cpu()")
    if int(os.environ.get("RANK", 0)) != 0:
        log.violation("torch.save was called on a rank other than 0")
    log.call("save")
    return original_save(content, *args, **kwargs)


def _contains_card_tensors(value):
    if isinstance(value, dict):
        return any(_contains_card_tensors(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_contains_card_tensors(item) for item in value)
    return is_on_card(value)
