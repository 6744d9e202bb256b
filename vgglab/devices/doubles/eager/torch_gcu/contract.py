"""The log of calls in order, and the rules that it is checked against."""

import functools
import json
import os

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel


class ContractBroken(AssertionError):
    """The vendor's contract forbids this; the message says what it requires."""


class Log:
    """``calls`` in order, as ``(name, details)``."""

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

    def broken(self, text):
        self.call("broken", text=text)
        raise ContractBroken(text)

    def count(self, name):
        """The number of calls with this name."""
        return sum(called == name for called, _ in self.calls)


log = Log()


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def watch():
    """Wrap the functions that the rules apply to."""
    torch.Tensor.backward = before(torch.Tensor.backward, _backward)
    for optimizer in vars(torch.optim).values():
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer) and "step" in vars(optimizer):
            optimizer.step = before(optimizer.step, _step)
    torch.distributed.init_process_group = before(torch.distributed.init_process_group, _join)
    DistributedDataParallel.__init__ = before(DistributedDataParallel.__init__, _wrap)
    card = torch.gcu
    card.set_device = before(card.set_device, _select)
    card.synchronize = before(card.synchronize, lambda *_, **__: log.call("synchronize"))
    card.empty_cache = before(card.empty_cache, _empty_cache)
    card.manual_seed_all = before(card.manual_seed_all, lambda seed: log.call("manual_seed_all", seed=int(seed)))
    card.Event.record = before(card.Event.record, _record)


def before(function, rule):
    @functools.wraps(function)
    def watched(*args, **kwargs):
        rule(*args, **kwargs)
        return function(*args, **kwargs)

    return watched


def _backward(tensor, *args, **kwargs):
    if log.num_steps_since_backward == 0:
        log.broken("two backward passes without an optimizer.step() between them")
    log.num_steps_since_backward = 0
    log.call("backward")


def _step(optimizer, *args, **kwargs):
    log.num_steps_since_backward += 1
    if log.num_steps_since_backward > 1:
        log.broken("two optimizer.step() calls after one backward pass")
    log.call("optimizer.step")


def _select(device):
    log.card = device if isinstance(device, int) else torch.device(device).index
    log.call("set_device", card=log.card)


def _join(backend=None, *args, **kwargs):
    if backend != "eccl":
        log.broken(f"process group with backend {backend}; this card needs eccl")
    if log.card != local_rank():
        log.broken("set_device(LOCAL_RANK) must come before init_process_group")
    log.call("init_process_group", backend=backend)


def _wrap(parallel, module, device_ids=None, *args, **kwargs):
    if device_ids != [local_rank()]:
        log.broken(f"DistributedDataParallel(device_ids={device_ids}); this rank's card is [{local_rank()}]")
    log.call("DistributedDataParallel", device_ids=device_ids)


def _empty_cache():
    log.call("empty_cache")
    if log.count("empty_cache") > 1:
        log.broken("repeated calls of empty_cache() fragment this card's memory until none is left")


def _record(event, stream=None):
    if event._recorded is not None:
        log.broken("an event was recorded twice; create a new one for each measurement")
