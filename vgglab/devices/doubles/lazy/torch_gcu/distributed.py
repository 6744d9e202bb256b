"""The double of ``torch_gcu.distributed``: eccl's functions, implemented with gloo."""

import torch.distributed as gloo

from torch_gcu.core.contract import log
from torch_gcu.core.tensor import Plain, is_on_card, mark_computed

ReduceOp = gloo.ReduceOp


def init_process_group(backend, init_method="env://", world_size=-1, rank=-1):
    if backend != "eccl":
        raise RuntimeError("only the backend eccl is supported")
    if gloo.is_initialized():
        raise RuntimeError("the process group is already initialised")
    log.call("init_process_group")
    gloo.init_process_group("gloo", init_method=init_method, world_size=world_size, rank=rank)
    barrier()


def all_reduce(tensor, op=ReduceOp.SUM):
    """All-reduce in place; a pending tensor stays pending, a computed one stays computed."""
    if not is_on_card(tensor):
        raise RuntimeError("all_reduce takes a tensor on the card")
    log.call("all_reduce")
    was_pending = not tensor._is_computed
    with Plain():
        gloo.all_reduce(tensor, op=op)
    if not was_pending:
        mark_computed(tensor)


def barrier():
    gloo.barrier()


def is_available():
    return True


def is_initialized():
    return gloo.is_initialized()


def get_rank():
    return gloo.get_rank()


def get_world_size():
    return gloo.get_world_size()


def destroy_process_group():
    log.call("destroy_process_group")
    gloo.destroy_process_group()
