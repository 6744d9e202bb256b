"""The double of ``torch_gcu.core.model``: the functions that end a step."""

import enum
import os

import torch

from torch_gcu.core.contract import log
from torch_gcu.core.tensor import is_on_card, mark_computed

allowed_steps: list = []  # not empty while a function of torch_gcu calls optimizer.step()


class JitRunMode(enum.Enum):
    SYNC = 0
    ASYNC = 1
    SAFEASYNC = 2


def optimizer_step(
    optimizer, extra_output=None, optimizer_args=None, model=None, mode=JitRunMode.SAFEASYNC, device=None
):
    """Call ``optimizer.step()`` once, then run one graph with weights, optimizer state, outputs and buffers."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if model is None:
        log.violation("optimizer_step without model makes every live tensor an output; pass model=")
    _check_mode(mode)
    with allow_step():
        result = optimizer.step(**(optimizer_args or {}))
    log.flush("optimizer_step")
    outputs = extra_output if isinstance(extra_output, (list, tuple)) else [extra_output]
    if not all(is_on_card(tensor) for tensor in outputs):
        outputs = []  # silently dropped: reading them later is a graph break
    for tensor in [*_training_state(model, optimizer), *outputs]:
        mark_computed(tensor)
    return result


def unlazy(tensors, mode=JitRunMode.SAFEASYNC):
    """Run one graph with these outputs."""
    if not isinstance(tensors, (list, tuple)) or not all(is_on_card(tensor) for tensor in tensors):
        raise TypeError("unlazy takes a list or tuple of tensors on the card")
    if not tensors:
        log.violation("unlazy was called without tensors")
    _check_mode(mode)
    if log.scaled_loss is not None:
        _check_amp_outputs(tensors)
    log.flush("unlazy")
    for tensor in tensors:
        mark_computed(tensor)


def _check_amp_outputs(tensors):
    from torch_gcu.amp import scalers

    output_ids = {id(tensor) for tensor in tensors}
    missing = [name for name, tensor in log.required_outputs.items() if id(tensor) not in output_ids]
    for scaler in scalers:
        missing += [name for name in ("_scale", "_growth_tracker") if id(getattr(scaler, name)) not in output_ids]
    if id(log.scaled_loss) not in output_ids:
        missing.append("the loss")
    results = [tensor for tensor in tensors if not isinstance(tensor, torch.nn.Parameter) and not tensor.is_leaf]
    if not any(tensor.dim() > 0 for tensor in results):
        missing.append("the model's output")
    if missing:
        log.violation(f"unlazy at the end of a mixed-precision step leaves out {', '.join(missing[:5])}")


def sync_lived_tensor(device=None, mode=JitRunMode.SAFEASYNC):
    log.violation("sync_lived_tensor is for point-to-point calls; a step ends with optimizer_step or unlazy")


def collect_amp_training_params(model, optimizer, scaler):
    """Return weights, optimizer state, buffers, and the scaler's scale and growth tracker."""
    from torch_gcu.amp import GradScaler

    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler is a {type(scaler).__name__}, not torch_gcu.amp.GradScaler")
    return [*_training_state(model, optimizer), scaler._scale, scaler._growth_tracker]


def collect_buffers(model):
    return [buffer for buffer in model.buffers() if is_on_card(buffer)]


def synchronize(device=None):
    log.call("synchronize")


def _training_state(model, optimizer):
    states = [v for state in optimizer.state.values() for v in state.values() if is_on_card(v)]
    return [*([] if model is None else model.parameters()), *states, *([] if model is None else collect_buffers(model))]


def _check_mode(mode):
    expected = JitRunMode.ASYNC if int(os.environ.get("WORLD_SIZE", 1)) > 1 else JitRunMode.SAFEASYNC
    if mode is not expected:
        log.violation(f"mode is {mode}; Enflame's scripts use {expected} here")


class allow_step:
    def __enter__(self):
        allowed_steps.append(True)

    def __exit__(self, *_):
        allowed_steps.pop()
