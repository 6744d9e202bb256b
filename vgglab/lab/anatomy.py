"""Analyse a network layer by layer: its cost, computed from the shapes or measured on this machine.

    python -m vgglab.anatomy --model vgg16 --image-size 224
    python -m vgglab.anatomy --batch-size 8 --measure  # also measure times and the machine's limits
    python -m vgglab.anatomy --model vgg11_bn --json   # the last line of stdout is one JSON object

    >>> vgglab.anatomy.of("vgg16")
    >>> vgglab.anatomy.of(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), image_size=8)

Only sequential networks such as VGG are supported: each layer takes the output of the previous layer.
Exit codes: 0 done, 1 a bug (with traceback), 2 bad input (explained in one line), 130 interrupted.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from math import prod
from statistics import median
from typing import Any, Iterator, Tuple

import torch
from torch import Tensor, nn

from vgglab.devices import open_device
from vgglab.devices.base import Device
from vgglab.errors import UserError
from vgglab.lab.ceilings import ceilings, time_call, to_device
from vgglab.lab.shapes import HAS_META, output_of, shapes_only, window
from vgglab.model import build
from vgglab.view.anatomy_table import Anatomy, Ceilings, Layer

KINDS: dict[str, tuple[type, ...]] = {
    "conv": (nn.Conv2d,),
    "linear": (nn.Linear,),
    "batch norm": (nn.BatchNorm2d, nn.BatchNorm1d),
    "relu": (nn.ReLU,),
    "pool": (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    "dropout": (nn.Dropout, nn.Dropout2d),
    "flatten": (nn.Flatten, nn.Identity),
}
FLOAT32_BYTES = 4

# One layer of the forward pass: name, module, input shape, output shape.
Call = Tuple[str, nn.Module, Tuple[int, ...], Tuple[int, ...]]


def of(
    model: str | nn.Module = "vgg16", image_size: int = 224, batch_size: int = 1, num_classes: int = 1000
) -> Anatomy:
    """Count the parameters, operations and bytes of each layer of a network, without running it.

    Args:
        model: a name (``vgg16``, ``vgg16_bn``, ...), built with the classifier that training uses for this image size;
            or a network made of the layers in ``KINDS``, which is not modified.
        image_size: side of the square images, in pixels; their number of channels is that of the first convolution.
        batch_size: images per batch; the weights are counted as read once per batch.
        num_classes: number of classes, if ``model`` is a name.

    Raises:
        UserError: unknown name, a layer that is not in ``KINDS``, an unsupported image size, or a network that is not
            sequential.
    """
    if min(image_size, batch_size, num_classes) < 1:
        raise UserError("image_size, batch_size and num_classes must be whole numbers, 1 or more")
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        with shapes_only():
            network: nn.Module = build(model, num_classes=num_classes, image_size=image_size, init_weights=False)
    else:
        network = _without_weights(model)
    for path, module in _leaves(network):
        if not _kind(module):
            raise UserError(f"{path or name} is a {type(module).__name__}; anatomy supports {', '.join(KINDS)}")
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    shape = (batch_size, channels, image_size, image_size)
    try:
        calls = _calls(network, shape)
    except (RuntimeError, ValueError) as error:  # torch's message for shapes that do not match
        raise UserError(f"{name}, {image_size} x {image_size} pixels: {str(error).splitlines()[0]}") from error
    return Anatomy(name, image_size, batch_size, tuple(_rows(calls, shape)), tuple(call[1] for call in calls))


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy for tracing: in float32, without weight values or hooks."""
    memo: dict[int, Any] = {}  # deepcopy's memo: it treats these as copied already
    if HAS_META:
        memo.update((id(value), value.to("meta")) for value in model.buffers())
        memo.update((id(value), nn.Parameter(value.to("meta"), value.requires_grad)) for value in model.parameters())
    network = copy.deepcopy(model, memo).float()
    for module in network.modules():
        module._forward_hooks.clear()
    return network


def _calls(network: nn.Module, shape: tuple[int, ...]) -> list[Call]:
    """Return the layers in the order of the forward pass, with their shapes, without computing anything."""
    calls: list[Call] = []

    def record(name: str, module: nn.Module, images: Tensor) -> Tensor:
        output = output_of(module, images)
        calls.append((name, module, tuple(images.shape), tuple(output.shape)))
        return output

    leaves = _leaves(network)
    for name, module in leaves:
        module.forward = partial(record, name, module)
    try:
        with torch.no_grad():
            network.eval()(torch.empty(shape))  # pages that are never written take no memory
    finally:
        for _, module in leaves:
            del module.forward
    return calls


def _rows(calls: list[Call], shape: tuple[int, ...]) -> Iterator[Layer]:
    image_size = shape[-1]
    counted: set[int] = set()  # parameters, by identity
    field = jump = 1  # at the input: one pixel
    start = 0
    needs_input_grad = False  # whether an earlier layer is trained
    for name, module, input_shape, output_shape in calls:
        if prod(input_shape) != prod(shape):
            hint = "use a sequential network in which only layers change the shape (nn.MaxPool2d, not F.max_pool2d)"
            raise UserError(f"{name}: its input does not match the output of the previous layer; {hint}")
        shape = output_shape
        weights = list(module.parameters())
        states = [buffer for buffer in module.buffers() if buffer.is_floating_point()]  # batch norm's mean and variance
        values = prod(input_shape) + sum(tensor.numel() for tensor in [*weights, *states]) + prod(output_shape)
        multiply_adds = _multiply_adds(module, output_shape)
        num_gradients = needs_input_grad + weights[0].requires_grad if multiply_adds else 0
        # The standard recursion: a kernel of size k adds k - 1 jumps, each padded pixel moves the start back by a jump,
        # and the stride multiplies the jump. Source: Araujo, Norris, Sim, "Computing receptive fields of convolutional
        # neural networks", Distill, 2019, doi 10.23915/distill.00021.
        extent, stride, padding = window(module, input_shape[-1], output_shape[-1])
        field, start, jump = field + (extent - 1) * jump, start - padding * jump, jump * stride
        if isinstance(module, nn.Linear):
            start = start if field > image_size else 0
            field, jump = max(field, image_size), image_size
        yield Layer(
            name=name,
            kind=_kind(module),
            output_shape=output_shape,
            num_parameters=sum(weight.numel() for weight in weights if id(weight) not in counted),
            multiply_adds=multiply_adds,
            bytes_moved=0 if _kind(module) == "flatten" else FLOAT32_BYTES * values,
            receptive_field=field,
            field_start=start,
            jump=jump,
            input_shape=input_shape,
            training_multiply_adds=multiply_adds * (1 + num_gradients),
        )
        counted.update(map(id, weights))
        needs_input_grad = needs_input_grad or any(weight.requires_grad for weight in weights)


def _multiply_adds(module: nn.Module, output_shape: tuple[int, ...]) -> int:
    """Return the multiply-adds for one image: the number of output values times the weights applied for each."""
    if isinstance(module, nn.Conv2d):
        return prod(output_shape[1:]) * module.weight[0].numel()  # (channels in / groups) x height x width
    return prod(output_shape[1:]) * module.in_features if isinstance(module, nn.Linear) else 0


def _kind(module: nn.Module) -> str:
    return next((kind for kind, types in KINDS.items() if isinstance(module, types)), "")


def _leaves(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in network.named_modules() if not list(module.children())]


def measure(what: Anatomy | str | nn.Module, device: Device | str = "auto", repeats: int = 5) -> Anatomy:
    """Time the forward and backward pass of each layer separately, and measure the limits of the machine.

    Each layer runs in float32 and training mode, with newly initialised weights and random input. After one warm-up
    pass, ``repeats`` passes are timed; the median is reported. A layer can slightly exceed 100 % of the limits, because
    these are measured with torch too: a convolution may be better optimised than the matrix product, a layer that
    mostly reads is faster than a copy, and the data of small layers may be in the cache.

    Args:
        what: a result of ``of``, or a model as for ``of``.
        device: a name as for ``--device``, or an open device from ``vgglab.devices.open_device``.
        repeats: number of timed passes.

    Returns:
        The same rows with ``forward_seconds`` and ``backward_seconds`` for the whole batch, and ``ceilings``.

    Raises:
        UserError: as in ``of``; also if the card is simulated, or if batch norm gets only one value per channel.
    """
    anatomy = what if isinstance(what, Anatomy) else of(what)
    if isinstance(device, str):
        card = open_device(device)
        card.open()
        try:
            return measure(anatomy, card, repeats)
        finally:
            card.close()
    limits = ceilings(device, repeats)
    layers, needs_input_grad = [], False  # whether an earlier layer is trained
    for layer, module in zip(anatomy.layers, anatomy.modules):
        try:
            forward, backward = _layer_seconds(layer, module, needs_input_grad, device, repeats)
        except ValueError as error:  # torch's message about batch norm
            raise UserError(f"{layer.name}: {str(error).splitlines()[0]}; use a larger batch") from error
        layers.append(layer._replace(forward_seconds=forward, backward_seconds=backward))
        needs_input_grad = needs_input_grad or any(weight.requires_grad for weight in module.parameters())
    limits = Ceilings(*map(max, limits, ceilings(device, repeats)))  # other load may have lowered the first result
    return replace(anatomy, layers=tuple(layers), ceilings=limits)


def _layer_seconds(
    layer: Layer, module: nn.Module, needs_input_grad: bool, device: Device, repeats: int
) -> tuple[float, float]:
    module = copy.deepcopy(module).to_empty(device="cpu").train()
    getattr(module, "reset_parameters", int)()  # to_empty does not initialise the weights
    module = device.wrap(module)[1]
    images = to_device(torch.randn(layer.input_shape), device).requires_grad_(needs_input_grad)
    inputs = [images] * needs_input_grad + [weight for weight in module.parameters() if weight.requires_grad]
    gradient = to_device(torch.randn(layer.output_shape), device)
    forward, backward = [], []
    for _ in range(1 + repeats):
        batch = time_call(images.clone, device)[1]  # an in-place layer overwrites its input
        seconds, output = time_call(partial(module, batch), device)
        forward.append(seconds)
        run_backward = partial(torch.autograd.grad, output, inputs, gradient)
        backward.append(time_call(run_backward, device)[0] if inputs else 0.0)
    return median(forward[1:]), median(backward[1:])
