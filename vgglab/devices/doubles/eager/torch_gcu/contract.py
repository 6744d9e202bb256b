"""The log of calls in order, and the rules that it is checked against."""

import functools
import json
import os

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel


class ContractViolation(AssertionError):
    """Raised by a call that breaks the vendor's contract; the message says how."""


class Log:
    """The log of a process: ``calls`` lists the calls so far in order, as ``(name, details)``."""

    def __init__(self):
        self.calls = []
        self.card = None  # what set_device has chosen
        self.num_steps_since_backward = 1
        self._file = os.environ.get("VGGLAB_DOUBLE_LOG")

    def call(self, name, **details):
        self.calls.append((name, details))
        if self._file:
            with open(self._file, "a") as file:
                file.write(json.dumps({"rank": int(os.environ.get("RANK", 0)), "call": name, **details}) + "\n")

    def violation(self, text):
        self.call("violation", text=text)
        raise ContractViolation(text)

    def count(self, name):
        """Return the number of calls with this name."""
        return sum(called == name for called, _ in self.calls)


log = Log()


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def install_checks():
    """Wrap the functions that the rules apply to."""
    torch.Tensor.backward = check_first(torch.Tensor.backward, _check_backward)
    for optimizer in vars(torch.optim).values():
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer) and "step" in vars(optimizer):
            optimizer.step = check_first(optimizer.step, _check_step)
    torch.distributed.init_process_group = check_first(torch.distributed.init_process_group, _check_init_process_group)
    DistributedDataParallel.__init__ = check_first(DistributedDataParallel.__init__, _check_parallel)
    card = torch.gcu
    card.set_device = check_first(card.set_device, _record_set_device)
    card.synchronize = check_first(card.synchronize, lambda *_, **__: log.call("synchronize"))
    card.empty_cache = check_first(card.empty_cache, _check_empty_cache)
    card.manual_seed_all = check_first(card.manual_seed_all, lambda seed: log.call("manual_seed_all", seed=int(seed)))
    card.Event.record = check_first(card.Event.record, _check_record)


def check_first(function, check):
    @functools.wraps(function)
    def checked(*args, **kwargs):
        check(*args, **kwargs)
        return function(*args, **kwargs)

    return checked


def _check_backward(tensor, *args, **kwargs):
    if log.num_steps_since_backward == 0:
        log.violation("two backward passes without an optimizer.step() between them")
    log.num_steps_since_backward = 0
    log.call("backward")


def _check_step(optimizer, *args, **kwargs):
    log.num_steps_since_backward += 1
    if log.num_steps_since_backward > 1:
        log.violation("two optimizer.step() calls after one backward pass")
    log.call("optimizer.step")


def _record_set_device(device):
    log.card = device if isinstance(device, int) else torch.device(device).index
    log.call("set_device", card=log.card)


def _check_init_process_group(backend=None, *args, **kwargs):
    if backend != "eccl":
        log.violation(f"process group with backend {backend}; this card needs eccl")
    if log.card != local_rank():
        log.violation("set_device(LOCAL_RANK) must come before init_process_group")
    log.call("init_process_group", backend=backend)


def _check_parallel(parallel, module, device_ids=None, *args, **kwargs):
    if device_ids != [local_rank()]:
        log.violation(f"DistributedDataParallel(device_ids={device_ids}); this rank's card is [{local_rank()}]")
    log.call("DistributedDataParallel", device_ids=device_ids)


def _check_empty_cache():
    log.call("empty_cache")
    if log.count("empty_cache") > 1:
        log.violation("repeated calls of empty_cache() fragment this card's memory until none is left")


def _check_record(event, stream=None):
    if event._timestamp is not None:
        log.violation("an event was recorded twice; create a new one for each measurement")
