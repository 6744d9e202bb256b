"""Sums, batch norm and comparisons over all ranks, using PyTorch's process group."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

if TYPE_CHECKING:
    from vgglab.devices.base import Device

MAX_WAIT_SECONDS = 1.0


def sum_over_ranks(*tensors: Tensor) -> None:
    """All-reduce (sum) each tensor in place.

    Returns only after gloo's threads have released the tensors. To release one, a thread registers with Python; if a
    loader worker is forked at that moment, the worker hangs on Python 3.8 to 3.11 (python/cpython issue 112275), and
    then all ranks hang. So gloo gets separate tensor objects that share the memory, and this function waits until they
    are released (at most one second, because another library may keep them).
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


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks. The backward pass is the same sum, because each input affects the loss of every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        sum_over_ranks(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that computes training statistics over all ranks; their batches must have the same size.

    It uses plain operations, for devices without kernels for PyTorch's ``nn.SyncBatchNorm``.

    Each rank normalises with the mean and variance of the global batch (Ioffe & Szegedy 2015, algorithm 1). The result
    is that of one rank with all images, up to float32 rounding. This takes two all-reduces, one for the mean and then
    one for the variance around it. With sums of squares, one would be enough, but the result would be less accurate.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a tensor ``(N, C, H, W)``, computing in float32, or in float64 if the input is float64."""
        if not self.training:
            return super().forward(input)
        assert self.momentum is not None
        images = input.to(torch.promote_types(input.dtype, torch.float32))
        num_ranks = torch.distributed.get_world_size()
        mean = _SumOverRanks.apply(images.mean((0, 2, 3))) / num_ranks  # (C,)
        centred = images - mean[:, None, None]
        variance = _SumOverRanks.apply((centred * centred).mean((0, 2, 3))) / num_ranks  # (C,), biased
        count = num_ranks * images.numel() // images.shape[1]
        with torch.no_grad():
            self.get_buffer("num_batches_tracked").add_(1)
            self.get_buffer("running_mean").lerp_(mean, self.momentum)
            unbiased = variance * (count / (count - 1))  # the running variance is unbiased in PyTorch
            self.get_buffer("running_var").lerp_(unbiased, self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Turn every ``nn.BatchNorm2d`` into a ``SyncBatchNorm2d`` with the same weights and statistics."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # same parameters, same buffers, same names in a checkpoint
    return model


def weights_agree(network: nn.Module, device: Device) -> bool:
    """Return whether all ranks have the same weights, judged by the first convolution and all biases."""
    if device.world_size == 1:
        return True
    small = [weight for weight in network.parameters() if weight.numel() < 10_000]
    own = torch.cat([torch.tensor(device.fetch(weight)).flatten() for weight in small])
    own = own.nan_to_num()  # NaN does not equal itself; save_checkpoint reports it
    of_rank_0 = device.fetch(device.sum(own if device.rank == 0 else torch.zeros_like(own)))
    return device.true_on_all_ranks(of_rank_0 == own.tolist())


def broadcast_buffers(network: nn.Module, device: Device) -> None:
    """Copy rank 0's batch-norm statistics to all ranks, so that each evaluates the network that is saved."""
    if device.world_size > 1:
        for buffer in network.buffers():
            buffer.copy_(device.sum(buffer if device.rank == 0 else torch.zeros_like(buffer)))
        device.flush(list(network.buffers()))
