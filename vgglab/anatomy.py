"""What a network is made of and what it costs, layer by layer: counted from its shapes, then measured on this machine.

    python -m vgglab.anatomy --model vgg16 --image-size 224
    python -m vgglab.anatomy --batch-size 8 --measure  # with times, and the two ceilings of the machine
    python -m vgglab.anatomy --model vgg11_bn --json   # the last line of stdout is one JSON object

    >>> vgglab.anatomy.of("vgg16")
    >>> vgglab.anatomy.of(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), image_size=8)

It reads chains, such as VGG: each layer takes what the one before it wrote.
Exit codes: 0 done; 1 a bug, with its traceback; 2 bad input, said in one line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from statistics import median
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from vgglab.config import OneLineParser, with_dashes
from vgglab.config import parse as parse_training
from vgglab.devices import open_device
from vgglab.devices.base import Device
from vgglab.errors import UserError
from vgglab.model import build, head_for
from vgglab.view.anatomy_table import Ceilings, Layer, as_html, as_text

__all__ = ["Anatomy", "Ceilings", "Layer", "ceilings", "measure", "of"]

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
HAS_META = int(torch.__version__.split(".")[0]) >= 2  # tensors with a shape and no memory, for every operation here
# A matrix product grows until it takes so long that starting it and reading the clock no longer count.
PRODUCT_SECONDS, SMALLEST_SIDE, LARGEST_SIDE = 0.05, 512, 8192
COPIED_BYTES = 2**28  # of each of three tensors: far more than any cache of a core or a card (32 MiB, 50 MiB)


@dataclass(frozen=True, repr=False, eq=False)
class Anatomy(Sequence[Layer]):
    """The layers of a network in the order of its forward pass; shows itself as a table, totals in the last row."""

    model: str
    image_size: int  # side, in pixels
    batch_size: int
    layers: tuple[Layer, ...]
    modules: tuple[nn.Module, ...]  # what the rows are about; their weights have shapes and no values
    ceilings: Ceilings | None = None  # once measured

    def __getitem__(self, place: Any) -> Any:
        return self.layers[place]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self)

    @property
    def multiply_adds(self) -> int:
        """Of the forward pass, for one image; a FLOP counter says twice as much."""
        return sum(layer.multiply_adds for layer in self)

    @property
    def training_flop(self) -> int:
        """Of the forward and the backward pass, for one image: 92.65e9 for VGG16 at 224 pixels."""
        return sum(layer.training_flop for layer in self)

    @property
    def title(self) -> str:
        return f"{self.model}: images of {self.image_size} x {self.image_size}, {self.batch_size} at a time"

    def __repr__(self) -> str:
        return as_text(self, self.ceilings, self.title)

    def _repr_html_(self) -> str:
        return as_html(self, self.ceilings, self.title)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the totals, the layers, and the ceilings once measured."""
        names = "model image_size batch_size num_parameters multiply_adds training_flop".split()
        layers = [{**layer._asdict(), "flop": layer.flop, "intensity": layer.intensity} for layer in self]
        roof = self.ceilings and self.ceilings._asdict()
        return {**{name: getattr(self, name) for name in names}, "layers": layers, "ceilings": roof}


class Call(NamedTuple):
    """A layer, as the forward pass came by."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def of(
    model: str | nn.Module = "vgg16", image_size: int = 224, batch_size: int = 1, num_classes: int = 1000
) -> Anatomy:
    """Count what each layer of a network holds, computes and moves, without computing it.

    Args:
        model: a name (``vgg16``, ``vgg16_bn``, ...; below 224 pixels with the small classifier, as in training), or a
            network made of the layers in ``KINDS``, which is left as it is.
        image_size: side of the square images, in pixels; with as many channels as the first convolution takes.
        batch_size: images that pass at once; the weights are read once for all of them.
        num_classes: width of the last layer, for a name.

    Raises:
        UserError: no network of that name; a layer that is not in ``KINDS``; images that do not fit; not a chain.
    """
    if min(image_size, batch_size, num_classes) < 1:
        raise UserError("image_size, batch_size and num_classes: whole numbers, 1 or more")
    name = model if isinstance(model, str) else type(model).__name__
    network = _named(model, image_size, num_classes) if isinstance(model, str) else _hollow(model)
    for path, module in _leaves(network):
        if not _kind(module):
            raise UserError(f"{path or name} is a {type(module).__name__}; anatomy knows {', '.join(KINDS)}")
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    shape = (batch_size, channels, image_size, image_size)
    try:
        calls = _calls(network, shape)
    except (RuntimeError, ValueError) as error:  # torch's words for shapes that do not fit
        raise UserError(f"{name} cannot take images of {image_size} x {image_size}: {_first_line(error)}") from error
    return Anatomy(name, image_size, batch_size, tuple(_rows(calls, shape)), tuple(call.module for call in calls))


def _named(name: str, image_size: int, num_classes: int) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes, "head": head_for(image_size), "init_weights": False}
    if not HAS_META:
        return build(name, **options)
    with torch.device("meta"):
        return build(name, **options)


def _hollow(model: nn.Module) -> nn.Module:
    """A copy to walk through: in float32, without the values of the weights and what the reader has hooked onto it."""
    known: dict[int, Any] = {}
    if HAS_META:  # deepcopy takes these for copies that it has made already
        for weight in model.parameters():
            known[id(weight)] = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
        known.update((id(buffer), buffer.to("meta")) for buffer in model.buffers())
    network = copy.deepcopy(model, known).float()
    for module in network.modules():
        module._forward_hooks.clear()
    return network


def _calls(network: nn.Module, shape: tuple[int, ...]) -> list[Call]:
    calls: list[Call] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(Call(name, module, tuple(inputs[0].shape), tuple(output.shape)))

    for name, module in _leaves(network):
        module.register_forward_hook(partial(note, name))
    with torch.no_grad():
        network.eval()(torch.empty(shape, device="meta") if HAS_META else torch.zeros(shape))
    return calls


def _rows(calls: list[Call], shape: tuple[int, ...]) -> Iterator[Layer]:
    image_size = shape[-1]
    counted: set[int] = set()  # parameters, by identity
    field = jump = 1  # a pixel sees itself
    learns = False  # something before this layer
    for name, module, input_shape, output_shape in calls:
        if prod(input_shape) != prod(shape):
            raise UserError(
                f"{name} does not take what the layer before it wrote; anatomy reads chains, in which all that changes "
                "shapes is a layer (nn.MaxPool2d, not F.max_pool2d)"
            )
        shape = output_shape
        weights = list(module.parameters())
        states = [buffer for buffer in module.buffers() if buffer.is_floating_point()]  # batch norm's mean and variance
        values = prod(input_shape) + sum(tensor.numel() for tensor in [*weights, *states]) + prod(output_shape)
        multiply_adds = _multiply_adds(module, output_shape)
        num_gradients = learns + weights[0].requires_grad if multiply_adds else 0
        # The usual recursion: k neighbours span k - 1 jumps, a stride multiplies the jump. Source: A. Araujo, W. Norris,
        # J. Sim, "Computing receptive fields of convolutional neural networks", Distill, 2019 (10.23915/distill.00021).
        extent, stride = _window(module, input_shape[-1], output_shape[-1])
        field, jump = field + (extent - 1) * jump, jump * stride
        if isinstance(module, nn.Linear):
            field, jump = max(field, image_size), image_size
        yield Layer(
            name=name,
            kind=_kind(module),
            output_shape=output_shape,
            num_parameters=sum(weight.numel() for weight in weights if id(weight) not in counted),
            multiply_adds=multiply_adds,
            bytes_moved=0 if _kind(module) == "flatten" else FLOAT32_BYTES * values,
            receptive_field=field,
            jump=jump,
            input_shape=input_shape,
            training_multiply_adds=multiply_adds * (1 + num_gradients),
        )
        counted.update(map(id, weights))
        learns = learns or _learns(module)


def _multiply_adds(module: nn.Module, output_shape: tuple[int, ...]) -> int:
    """For one image: every output value is a sum over the inputs that its weights span."""
    if isinstance(module, nn.Conv2d):
        return prod(output_shape[1:]) * module.weight[0].numel()  # (channels in / groups) x height x width
    return prod(output_shape[1:]) * module.in_features if isinstance(module, nn.Linear) else 0


def _window(module: nn.Module, size_in: int, size_out: int) -> tuple[int, int]:
    """Neighbours from the first to the last that one output sees, and the step to the next output's; longer side."""
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        sides = zip(_pair(module.kernel_size), _pair(getattr(module, "dilation", 1)))
        return max(dilation * (kernel - 1) + 1 for kernel, dilation in sides), max(_pair(module.stride))
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        # Output i pools from floor(i * in / out) up to ceil((i + 1) * in / out); where windows differ, the widest.
        starts = [i * size_in // size_out for i in range(size_out + 1)]
        ends = [-(-(i + 1) * size_in // size_out) for i in range(size_out)]
        return max(e - s for s, e in zip(starts, ends)), max(b - a for a, b in zip(starts, starts[1:]))
    return 1, 1


def _pair(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)


def _learns(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _kind(module: nn.Module) -> str:
    return next((kind for kind, types in KINDS.items() if isinstance(module, types)), "")


def _leaves(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in network.named_modules() if not list(module.children())]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def measure(what: Anatomy | str | nn.Module, device: Device, repeats: int = 5) -> Anatomy:
    """Time the forward and the backward pass of each layer by itself, and the ceilings of the machine.

    A layer gets fresh weights and random input of its shape, in float32 and training mode, and runs once to warm up
    and ``repeats`` times more; the median counts. What fits into a cache stays there between the repeats, so a small
    layer may come out above the ceiling of moving; one above that of computing needs fewer multiplications than are
    counted (Winograd's convolution).

    Args:
        what: the answer of ``of``, or what ``of`` takes.
        device: of ``vgglab.devices.open_device``, opened.
        repeats: passes that are timed.

    Returns:
        The same rows with ``forward_seconds`` and ``backward_seconds`` of the whole batch, and ``ceilings``.

    Raises:
        UserError: as ``of``; a simulated card; a batch norm with a single value per channel.
    """
    anatomy = what if isinstance(what, Anatomy) else of(what)
    roof = ceilings(device, repeats)
    layers, learns = [], False
    for layer, module in zip(anatomy.layers, anatomy.modules):
        try:
            forward, backward = _layer_seconds(layer, module, learns, device, repeats)
        except ValueError as error:  # torch's words on batch norm
            raise UserError(f"{layer.name}: {_first_line(error)}; a larger batch has more") from error
        layers.append(layer._replace(forward_seconds=forward, backward_seconds=backward))
        learns = learns or _learns(module)
    return replace(anatomy, layers=tuple(layers), ceilings=roof)


def _layer_seconds(layer: Layer, module: nn.Module, learns: bool, device: Device, repeats: int) -> tuple[float, float]:
    module = copy.deepcopy(module).to_empty(device="cpu").train()
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    module = device.wrap(module)[1]
    images = _moved(torch.randn(layer.input_shape), device).requires_grad_(learns)
    wanted = [images] * learns + [weight for weight in module.parameters() if weight.requires_grad]
    gradient = _moved(torch.randn(layer.output_shape), device)
    forward, backward = [], []
    for _ in range(1 + repeats):
        fed = images.clone()  # a layer that works in place needs its own each time
        _wait(fed, device)
        seconds, output = _timed(partial(module, fed), device)
        forward.append(seconds)
        pull = partial(torch.autograd.grad, output, wanted, gradient)
        backward.append(_timed(pull, device)[0] if wanted else 0.0)
    return median(forward[1:]), median(backward[1:])


def ceilings(device: Device, repeats: int = 5) -> Ceilings:
    """Measure what ``device`` computes and moves per second, the best of ``repeats``; takes seconds and 0.8 GB.

    Computing: square matrix products in float32, 2 n^3 FLOP. Moving: a copy (2 tensors) and ``a = b + 2 c`` (3), counted
    as J. McCalpin's STREAM does: what the program names, not what a cache reads before it writes.

    Raises:
        UserError: a simulated card, which has no speed.
    """
    if device.is_simulated:
        raise UserError(f"--device {device.kind}: a simulated card has no speed to measure")
    side, seconds, peak = SMALLEST_SIDE, 0.0, 0.0
    while seconds < PRODUCT_SECONDS and side <= LARGEST_SIDE:
        factors = [_moved(torch.rand(side, side), device) for _ in range(2)]
        seconds = _fastest(partial(torch.matmul, *factors), device, repeats)
        peak = max(peak, 2 * side**3 / seconds)
        side *= 2
    a, b, c = (_moved(torch.ones(COPIED_BYTES // FLOAT32_BYTES), device) for _ in range(3))
    copying = 2 * COPIED_BYTES / _fastest(partial(a.copy_, b), device, repeats)
    adding = 3 * COPIED_BYTES / _fastest(partial(torch.add, b, c, alpha=2, out=a), device, repeats)
    return Ceilings(peak, max(copying, adding))


def _fastest(run: Callable[[], Tensor], device: Device, repeats: int) -> float:
    return min([_timed(run, device)[0] for _ in range(1 + repeats)][1:])  # the first is warm-up


def _timed(run: Callable[[], Any], device: Device) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    _wait(result[-1] if isinstance(result, tuple) else result, device)
    return time.perf_counter() - started, result


def _wait(tensor: Tensor, device: Device) -> None:
    """Until it is computed: one of its values is read."""
    device.fetch(tensor.detach().reshape(-1)[:1])


def _moved(tensor: Tensor, device: Device) -> Tensor:
    return device.move(tensor, torch.zeros(1, dtype=torch.int64))[0]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UserError."""
    parser = OneLineParser(
        prog="vgglab.anatomy", usage="python -m vgglab.anatomy [--flag value ...]", allow_abbrev=False
    )
    parser.description = "What a network is made of and what it costs, layer by layer."
    for name, default, text in (
        ("model", "vgg16", "the network"),
        ("image-size", 224, "side of the square images, in pixels"),
        ("batch-size", 1, "images that pass at once"),
        ("num-classes", 1000, "width of the last layer"),
        ("device", "cpu", "where --measure measures"),
    ):
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})")
    parser.add_argument("--measure", action="store_true", help="time each layer, and the ceilings of the machine")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = vars(parser.parse_args([with_dashes(argument) for argument in argv]))
    wishes = {name: options.pop(name) for name in ("measure", "json")}
    # What is allowed is what training allows.
    flags = parse_training([f"--{name.replace('_', '-')}={value}" for name, value in options.items()])
    return argparse.Namespace(**wishes, **{name: getattr(flags, name) for name in options})


def main(argv: Sequence[str]) -> int:
    """The shell's door; the exit code."""
    try:
        options = parse(argv)
        anatomy = of(options.model, options.image_size, options.batch_size, options.num_classes)
        if options.measure:
            device = open_device(options.device)
            device.open()
            anatomy = measure(anatomy, device)
            device.close()
        print(anatomy)
        if options.json:
            print(json.dumps(anatomy.as_dict()))
    except UserError as error:
        print(f"vgglab.anatomy: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vgglab.anatomy: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
