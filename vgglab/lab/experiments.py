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
    outputs: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}

    def make_hook(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output.retain_grad()
            outputs[name] = output
            return output.clone()  # the next layer may modify it in place

        return hook

    hooks = [layer.register_forward_hook(make_hook(name)) for name, layer in layers.items()]
    try:
        model.train()
        nn.functional.cross_entropy(model(images), labels).backward()
        return [
            Signal(
                name,
                outputs[name].detach().std().item(),
                outputs[name].grad.std().item(),  # type: ignore[union-attr]
                (layer.weight.grad.std() / layer.weight.std()).item(),  # type: ignore[union-attr]
            )
            for name, layer in layers.items()
        ]
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def first_steps(model: nn.Module, batches: Iterable[Batch], lr: float, momentum: float = 0.9) -> list[float]:
    """Train with SGD and return the loss of each step; stop when the batches end or the loss is not finite."""
    optimizer = without_compiler(torch.optim.SGD)(model.parameters(), lr=lr, momentum=momentum)
    return list(_losses(model, batches, optimizer))


def learning_rate_range(
    model: nn.Module, batches: Sequence[Batch], lowest: float, highest: float, momentum: float = 0.9
) -> tuple[list[float], list[float]]:
    """Run a learning-rate range test from ``lowest`` to ``highest`` in geometric steps; return the rates and losses.

    Source: L. Smith, "Cyclical Learning Rates for Training Neural Networks", 2015, section 3.3. The test
    ends early if the loss is not finite.
    """
    optimizer = without_compiler(torch.optim.SGD)(model.parameters(), lr=lowest, momentum=momentum)
    factor = (highest / lowest) ** (1 / max(1, len(batches) - 1))
    rates, losses = [], []
    for loss in _losses(model, batches, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(loss)
        optimizer.param_groups[0]["lr"] *= factor
    return rates, losses


def _losses(model: nn.Module, batches: Iterable[Batch], optimizer: torch.optim.Optimizer) -> Iterator[float]:
    model.train()
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        if not math.isfinite(loss.item()):
            return
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield loss.item()


def copy_layers(shallow: nn.Module, deep: nn.Module, num_convolutions: int = 4) -> list[str]:
    """Initialise ``deep`` as in the paper: copy the first convolutions and the linear layers of a shallower network.

    A convolution is copied to the same position in the same block (the layers between two pooling layers). Returns
    the names of the copied layers. Source: Simonyan and Zisserman 2014, section 3.1, where the first four convolutions
    and the three linear layers of net A are copied.
    """
    source, target = _by_position(shallow), _by_position(deep)
    convolutions = [position for position in source if position[0] != "linear"][:num_convolutions]
    copied = []
    for position in [*convolutions, *(position for position in source if position[0] == "linear")]:
        name, layer = target[position]
        layer.load_state_dict(source[position][1].state_dict())
        copied.append(name)
    return copied


def _by_position(network: nn.Module) -> dict[tuple[Any, int], tuple[str, nn.Module]]:
    """Return the layers with weights, keyed by (block, number in the block) or ("linear", number)."""
    layers: dict[tuple[Any, int], tuple[str, nn.Module]] = {}
    block, number = 0, 0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.MaxPool2d):
            block, number = block + 1, 0
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            is_linear = isinstance(layer, nn.Linear)
            position = ("linear", sum(key[0] == "linear" for key in layers)) if is_linear else (block, number)
            layers[position] = (name, layer)
            number += 1
    return layers
