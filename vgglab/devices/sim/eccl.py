"""``eccl`` for simulated cards: a process group that uses gloo."""

# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.futures import Future
from torch.utils import _pytree as pytree

from vgglab.devices.sim.card import narrow_, state
from vgglab.devices.sim.tensor import SimTensor


def register() -> None:
    dist.Backend.register_backend("eccl", _create, devices=["gcu"])
    dist.is_eccl_available = lambda: True  # type: ignore[attr-defined]


def _create(store: Any, rank: int, size: int, timeout: Any) -> ProcessGroup:
    return SimulatedEccl(dist.ProcessGroupGloo(dist.PrefixStore("eccl", store), rank, size, timeout), rank, size)


class SimulatedEccl(ProcessGroup):
    """A process group for tensors on gcu only. Each collective has finished when its call returns: no overlap."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._gloo = gloo

    def getBackendName(self) -> str:
        return "eccl"

    def allreduce(self, tensors: Any, options: Any = None) -> Any:
        is_mean = options is not None and options.reduceOp == dist.ReduceOp.AVG
        if is_mean:  # gloo has no AVG
            options.reduceOp = dist.ReduceOp.SUM
        work = self._run("allreduce", tensors, tensors, *([] if options is None else [options]))
        if is_mean:
            for tensor in tensors:
                tensor._card_storage.values.div_(self.size())
        return work

    def allreduce_coalesced(self, tensors: Any, options: Any = None) -> Any:
        for tensor in tensors:
            work = self.allreduce([tensor], dist.AllreduceOptions())
        return work

    def broadcast(self, tensors: Any, options: Any) -> Any:
        return self._run("broadcast", tensors, tensors, options)

    def reduce(self, tensors: Any, options: Any) -> Any:
        return self._run("reduce", tensors, tensors, options)

    def allgather(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        return self._run("allgather", outputs, outputs, inputs)

    def gather(self, outputs: Any, inputs: Any, options: Any) -> Any:
        return self._run("gather", outputs, outputs, inputs, options)

    def scatter(self, outputs: Any, inputs: Any, options: Any) -> Any:
        return self._run("scatter", outputs, outputs, inputs, options)

    def send(self, tensors: Any, target: int, tag: int = 0) -> Any:
        return self._run("send", tensors, tensors, target, tag)

    def recv(self, tensors: Any, source: int, tag: int = 0) -> Any:
        return self._run("recv", tensors, tensors, source, tag)

    def barrier(self, options: Any = None) -> Any:
        self._gloo.barrier().wait()
        return _completed_work([])

    def _run(self, name: str, results: Any, *args: Any) -> Any:
        """Run gloo's collective ``name``, wait for it, and return a completed work object with ``results``."""
        state.lazy_init()
        collective = getattr(self._gloo, name)
        collective(*pytree.tree_map(_to_cpu, args)).wait()
        for result in pytree.tree_leaves(results):
            narrow_(result._card_storage.values)  # 64-bit values are sent as 32 bits
        return _completed_work(results)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not isinstance(value, SimTensor):
        raise RuntimeError(f"eccl accepts only tensors on gcu, but this one is on {value.device}")
    return value._card_storage.values if isinstance(value, SimTensor) else value


def _completed_work(result: Any) -> Any:
    future: Future = Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)
