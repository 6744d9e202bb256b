"""Small experiments on an untrained network: signal strength by layer, first steps, learning-rate range test.

Meant for notebooks on the CPU with small images: plain loops that write no files.

    >>> network = vl.model.build("vgg16", num_classes=10, head="small", init="normal")
    >>> vl.experiments.signals(network, images, labels)
"""

from __future__ import annotations

import math
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from vgglab.devices.compat import without_compiler
from vgglab.lab.features import feature_maps, named_layers
from vgglab.model import VGG

Batch = Any  # a pair: normalised images (N, 3, S, S), labels (N,)


class Signal(NamedTuple):
    """Standard deviations of the activations and gradients of one layer with weights, over a whole batch."""

    layer: str
    activation: float  # of its output
    gradient: float  # of the loss with respect to its output
    weight_gradient: float  # of the loss with respect to its weights, divided by the weights' standard deviation


def signals(model: nn.Module, images: Tensor, labels: Tensor) -> list[Signal]:
    """Measure each layer's ``Signal`` in one forward and backward pass in training mode.

    The weights are not changed, and the gradients are cleared afterwards.

    In a network that can learn, neither activations nor gradients shrink or grow by orders of magnitude from layer to
    layer (Glorot and Bengio 2010; He et al. 2015, "Delving Deep into Rectifiers").
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    maps = feature_maps(model.train(), images, {**layers, "": model})
    loss = nn.functional.cross_entropy(maps[""], labels)
    for output in maps.values():
        output.retain_grad()
    found = []
    try:
        loss.backward()
        for name, layer in layers.items():
            output, weight = maps[name], layer.weight
            relative = weight.grad.std() / weight.std()  # type: ignore[union-attr]
            gradient = output.grad.std()  # type: ignore[union-attr]
            found.append(Signal(name, output.std().item(), gradient.item(), relative.item()))
    finally:
        model.zero_grad(set_to_none=True)
    return found


def first_steps(model: nn.Module, batches: Iterable[Batch], lr: float) -> list[float]:
    """Train with SGD and return the loss of each step; stop when the batches end or the loss is not finite."""
    return [loss for _, loss in _train(model, batches, lr)]


def learning_rate_range(
    model: nn.Module, batches: Sequence[Batch], lowest: float, highest: float
) -> tuple[list[float], list[float]]:
    """Run a learning-rate range test from ``lowest`` to ``highest`` in geometric steps; return the rates and losses.

    Source: L. Smith, "Cyclical Learning Rates for Training Neural Networks", 2015, section 3.3. The test
    ends early if the loss is not finite.
    """
    factor = (highest / lowest) ** (1 / max(1, len(batches) - 1))
    steps = list(_train(model, batches, lowest, factor))
    return [rate for rate, _ in steps], [loss for _, loss in steps]


def _train(model: nn.Module, batches: Iterable[Batch], lr: float, factor: float = 1.0) -> Iterator[tuple[float, float]]:
    """Yield the learning rate and the loss of each step; the rate is multiplied by ``factor`` after each."""
    optimizer = without_compiler(torch.optim.SGD)(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        if not math.isfinite(loss.item()):
            return
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield optimizer.param_groups[0]["lr"], loss.item()
        optimizer.param_groups[0]["lr"] *= factor


def copy_layers(shallow: VGG, deep: VGG) -> list[str]:
    """Initialise ``deep`` as in the paper: copy four convolutions and the linear layers of a shallower network.

    A convolution is copied to the same position in the same block (the layers between two pooling layers). Returns
    the names of the copied layers. Source: Simonyan and Zisserman 2014, section 3.1, where the first four convolutions
    and the three linear layers of net A are copied.
    """
    source, target = named_layers(shallow), named_layers(deep)
    convolutions = [name for name in source if name.startswith("conv")][:4]
    pairs = [(source[name], target[name]) for name in convolutions]
    pairs += zip(_linear_layers(shallow), _linear_layers(deep))
    for original, copied in pairs:
        copied.load_state_dict(original.state_dict())
    names = {layer: name for name, layer in deep.named_modules()}
    return [names[copied] for _, copied in pairs]


def _linear_layers(network: VGG) -> list[nn.Module]:
    return [layer for layer in network.classifier if isinstance(layer, nn.Linear)]
