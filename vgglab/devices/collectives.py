"""Sums over the ranks, using PyTorch's process group."""

from __future__ import annotations

import time
import weakref

import torch
import torch.distributed
from torch import Tensor

MAX_SECONDS = 1.0


def sum_over_ranks(*tensors: Tensor) -> None:
    """All-reduce (sum) each tensor in place.

    Returns only after gloo's threads have released the tensors, for which they register with Python. A loader worker
    that is forked at that moment hangs on Python 3.8 to 3.11 (python/cpython issue 112275), and all ranks with it. So
    gloo gets separate tensor objects on the same memory, and this waits until they are released (at most a second,
    because another library may keep them).
    """
    lent = []
    for tensor in tensors:
        alias = tensor.detach()
        torch.distributed.all_reduce(alias)
        lent.append(weakref.ref(alias))
        del alias
    deadline = time.monotonic() + MAX_SECONDS
    while torch.distributed.get_backend() == "gloo" and any(one() is not None for one in lent):
        if time.monotonic() > deadline:
            return
        time.sleep(0.0001)  # gloo's threads need Python's lock to let go
