"""The table of a network's layers, and the two measured limits of a roofline; does not import torch.

``vgglab.anatomy`` computes the rows; its ``--json`` output can be shown on a machine without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Sequence

from vgglab.view.tables import Table, html_text

# Units are in the headings.
HEADINGS = (
    "layer|kind|output|parameters|multiply-\nadds, M|training\nGFLOP|moved\nMB|FLOP\nper byte|receptive\nfield|jump"
).split("|")
MEASURED_HEADINGS = "forward\nms|backward\nms|achieved\nGFLOP/s|roofline\nGFLOP/s|share".split("|")


class Window(NamedTuple):
    """The receptive field of one output, a square of pixels; negative coordinates are in the padding."""

    left: int
    top: int
    side: int


class Layer(NamedTuple):
    """One layer, a row of the table; rows are in the order of the forward pass.

    Attributes:
        name: as in ``model.named_modules()``.
        kind: conv, linear, batch norm, relu, pool, dropout or flatten.
        output_shape: ``(N, C, H, W)`` or ``(N, features)``, with N images in the batch; ``input_shape`` likewise.
        num_parameters: number of parameters; shared parameters are counted in the first layer that uses them.
        multiply_adds: multiply-adds of the forward pass for one image: those of convolutions and linear layers, without
            biases. The few operations of other layers are counted as 0, as in torch's FLOP counter.
        bytes_moved: minimum number of bytes moved by the forward pass in float32, for the whole batch: input and
            weights are read once, the output is written once. Flatten moves nothing.
        receptive_field: side of the square of pixels that one output can depend on. It can be larger than the image,
            because it includes padding. After a linear layer it covers the whole image.
        field_start: row and column at which that square begins for the output at (0, 0); negative if in the padding.
        jump: distance in pixels between the squares of neighbouring outputs: the product of all strides so far, or the
            image size after a linear layer.
        training_multiply_adds: multiply-adds of the forward and backward pass for one image. The gradient of the
            weights takes as many as the forward pass, and so does the gradient of the input, which is needed if an
            earlier layer is trained. If all layers are trained, the first one costs twice its forward pass, the others
            three times.
        forward_seconds, backward_seconds: seconds for the whole batch; None until measured.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    num_parameters: int
    multiply_adds: int
    bytes_moved: int
    receptive_field: int
    field_start: int
    jump: int
    input_shape: tuple[int, ...]
    training_multiply_adds: int
    forward_seconds: float | None = None
    backward_seconds: float | None = None

    def window(self, row: int, column: int) -> Window:
        """The pixels on which the output at ``(row, column)`` can depend; after a linear layer, the whole image."""
        top, left = (self.field_start + index * self.jump for index in (row, column))
        return Window(left, top, self.receptive_field)

    @property
    def flop(self) -> int:
        """FLOP of the forward pass for one image: two for each multiply-add."""
        return 2 * self.multiply_adds

    @property
    def training_flop(self) -> int:
        """FLOP of the forward and backward pass for one image."""
        return 2 * self.training_multiply_adds

    @property
    def activation_bytes(self) -> int:
        """Bytes of the output for one image, in float32: ``4 x C x H x W`` or ``4 x features``."""
        return 4 * math.prod(self.output_shape[1:])

    @property
    def intensity(self) -> float:
        """Arithmetic intensity of the forward pass: FLOP per byte moved, at this batch size."""
        return self.output_shape[0] * self.flop / self.bytes_moved if self.flop else 0.0

    @property
    def flop_per_second(self) -> float | None:
        """FLOP/s of the forward pass; None if not measured or if the layer has no FLOP."""
        return self.output_shape[0] * self.flop / self.forward_seconds if self.flop and self.forward_seconds else None


class Ceilings(NamedTuple):
    """The measured limits of a machine: the two lines of a roofline.

    Source: S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model for multicore
    architectures", Communications of the ACM 52(4), 2009.
    """

    flop_per_second: float  # peak compute
    bytes_per_second: float  # memory bandwidth

    @property
    def ridge(self) -> float:
        """FLOP per byte at which the two lines meet: with less, a layer is memory-bound; with more, compute-bound."""
        return self.flop_per_second / self.bytes_per_second

    def attainable(self, intensity: float) -> float:
        """The FLOP/s attainable by a layer with this arithmetic intensity."""
        return min(self.flop_per_second, intensity * self.bytes_per_second)


@dataclass(frozen=True, repr=False, eq=False)
class Anatomy(Sequence[Layer]):
    """The layers of a network in the order of the forward pass; displayed as a table with totals in the last row."""

    model: str
    image_size: int  # side, in pixels
    batch_size: int
    layers: tuple[Layer, ...]
    modules: tuple[Any, ...]  # the module of each row; weights have shapes but no values
    ceilings: Ceilings | None = None  # None until measured

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the forward pass for one image; twice as many FLOP."""
        return sum(layer.multiply_adds for layer in self)

    @property
    def training_flop(self) -> int:
        """FLOP of the forward and backward pass for one image: 92.65e9 for VGG16 at 224 pixels."""
        return sum(layer.training_flop for layer in self)

    @property
    def title(self) -> str:
        size, units = self.image_size, "multiply-adds and FLOP for one image"
        return f"{self.model}, {size} x {size} pixels: {units}, bytes for a batch of {self.batch_size}"

    def __repr__(self) -> str:
        table = self._table()
        first, second = zip(*(f"{heading}\n".split("\n")[:2] for heading in table.headings))
        return f"{self.title}\n\n{table._replace(headings=first, rows=[second, *table.rows])}"

    def _repr_html_(self) -> str:
        return html_text(self.title) + self._table()._repr_html_()

    def _table(self) -> Table:
        """One row per layer, totals in the last row; times and shares of the roofline if they were measured."""
        num_bytes = sum(layer.bytes_moved for layer in self)
        total = ["total", "", "", f"{self.num_parameters:,}", _scaled(self.multiply_adds, 1e6)]
        total += [_scaled(self.training_flop, 1e9, 2), _scaled(num_bytes, 1e6), "", "", ""]
        headings, note = HEADINGS, ""
        if self.ceilings:
            headings = HEADINGS + MEASURED_HEADINGS
            total += [_scaled(sum(layer.forward_seconds or 0 for layer in self), 1e-3)]
            total += [_scaled(sum(layer.backward_seconds or 0 for layer in self), 1e-3), "", "", ""]
            peak, bandwidth = self.ceilings.flop_per_second / 1e9, self.ceilings.bytes_per_second / 1e9
            ridge = f"ridge point at {self.ceilings.ridge:.1f} FLOP per byte"
            note = f"measured ceilings of this machine: {peak:.1f} GFLOP/s and {bandwidth:.1f} GB/s, {ridge}"
        rows = [*(_cells(layer, self.ceilings) for layer in self), total]
        sides = "<<<" + ">" * (len(headings) - 3)
        return Table(headings, rows, note=note, sides=sides, bold_rows=[len(self)])

    def as_dict(self) -> dict[str, Any]:
        """Return plain values: totals, layers and, if measured, the limits of the machine."""
        names = "model image_size batch_size num_parameters multiply_adds training_flop".split()
        layers = [{**layer._asdict(), "flop": layer.flop, "intensity": layer.intensity} for layer in self]
        ceilings = self.ceilings and self.ceilings._asdict()
        return {**{name: getattr(self, name) for name in names}, "layers": layers, "ceilings": ceilings}


def _cells(layer: Layer, ceilings: Ceilings | None) -> list[str]:
    cells = [
        layer.name,
        layer.kind,
        "x".join(map(str, layer.output_shape[1:])),
        f"{layer.num_parameters:,}" if layer.num_parameters else "",
        _scaled(layer.multiply_adds, 1e6),
        _scaled(layer.training_flop, 1e9, 2),
        _scaled(layer.bytes_moved, 1e6),
        _scaled(layer.intensity, 1),
        str(layer.receptive_field),
        str(layer.jump),
    ]
    if ceilings is None:
        return cells
    cells += [_scaled(layer.forward_seconds or 0, 1e-3), _scaled(layer.backward_seconds or 0, 1e-3)]
    if layer.flop_per_second is None:
        return [*cells, "", "", ""]
    attainable = ceilings.attainable(layer.intensity)
    share = f"{layer.flop_per_second / attainable:.0%}"
    return [*cells, _scaled(layer.flop_per_second, 1e9), _scaled(attainable, 1e9), share]


def _scaled(value: float, unit: float, digits: int = 1) -> str:
    """Format ``value / unit``, e.g. 1,849.7; with two significant digits below 1, e.g. 0.25; empty for 0."""
    value /= unit
    if not value:
        return ""
    return f"{value:.2g}" if value < 1 else f"{value:,.{digits}f}"
