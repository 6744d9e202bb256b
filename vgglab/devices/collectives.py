"""Sums over the ranks, using PyTorch's process group."""

from __future__ import annotations

import time
import weakref

import torch
import torch.distributed
from torch import Tensor

MAX_WAIT_SECONDS = 1.0


def sum_over_ranks(*tensors: Tensor) -> None:
    """All-reduce (sum) each tensor in place.

    Returns only after gloo's threads have released the tensors. To do so, a thread registers with Python; if a loader
    worker is forked at that moment, it hangs on Python 3.8 to 3.11 (python/cpython issue 112275), and so do all ranks.
    So gloo gets separate tensor objects that share the memory, and this function waits until they are released (at most
    one second, because another library may keep them).
    """
    references = []
    for tensor in tensors:
        alias = tensor.detach()
        torch.distributed.all_reduce(alias)
        references.append(weakref.ref(alias))
        del alias
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while torch.distributed.get_backend() == "gloo" and any(reference() is not None for reference in references):
        if time.monotonic() > deadline:
            return
        time.sleep(0.0001)  # gloo's threads need the GIL to release the tensors
