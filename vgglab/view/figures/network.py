"""Figures of a network: its architecture, drawn as boxes, and its roofline."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple, Sequence

import numpy as np
from matplotlib.patches import Rectangle

from vgglab.errors import UserError
from vgglab.view.anatomy_table import Anatomy, Ceilings, Layer
from vgglab.view.figures.base import BLUE, GREEN, INK, ORANGE, PURPLE, NotebookFigure, new_figure

WIDTH, HEIGHT = 5.2, 3.6  # inches; still legible at three quarters of this size, on a phone
STYLES = {
    "conv": (BLUE, "", "convolution, then ReLU"),
    "pool": (GREEN, "//", "pool (width not to scale)"),
    "linear": (ORANGE, "..", "linear (height on a separate scale)"),
    "batch norm": (PURPLE, "", "batch norm, before the ReLU"),
}
LABEL_GAP = 0.034  # between two labels of the roofline, as a fraction of its width
# Fractions of the total width of all maps.
GAP, POOL_WIDTH, LINEAR_WIDTH, MIN_WIDTH, LETTER_WIDTH = 0.007, 0.014, 0.05, 0.002, 0.02


def architecture(anatomy: Anatomy, marked: str = "") -> NotebookFigure:
    """Draw the whole network in one row, from the image on the left to the classes on the right.

    The box of a convolution is as high as its maps are in pixels, and its width is proportional to the number of
    channels. A pooling layer is a hatched bar with the height of its output. The height of a linear layer's box is
    its number of features, on a separate scale.

    Args:
        anatomy: a result of ``vgglab.anatomy.of``, of any depth and image size.
        marked: the name of a layer to point at; a layer other than a convolution, pool or linear
            layer is marked at the box before it.

    Raises:
        UserError: the layer does not exist, or the network has no layer that is drawn as a box.
    """
    picture = NotebookFigure(WIDTH, HEIGHT)
    draw(picture.subplots(), anatomy, marked)
    return picture


class Box(NamedTuple):
    """The box of a layer: its left edge and width as fractions of the total width, its height in pixels."""

    layer: Layer
    left: float
    width: float
    height: float

    @property
    def size_label(self) -> str:
        return "x".join(map(str, self.layer.output_shape[2:]))


def draw(panel: Any, anatomy: Anatomy, marked: str = "") -> None:
    """Draw ``architecture`` on matplotlib axes. The ``gid`` of a box is the name of its layer."""
    if marked and marked not in [layer.name for layer in anatomy]:
        raise UserError(f"no layer {marked!r} in {anatomy.model}; its first layer is {anatomy[0].name}")
    boxes = _boxes(anatomy)
    if not boxes:
        raise UserError(f"nothing to draw: {anatomy.model} has no convolution, pool or linear layer")
    size = anatomy.image_size
    panel.plot([-2 * GAP, -2 * GAP], [0, size], color=INK, linewidth=2)
    for box in boxes:
        _draw_box(panel, box.layer, (box.left, 0), box.width, box.height)
    by_name = {box.layer.name: box for box in boxes}
    current = marked_box = boxes[0]
    for layer in anatomy:
        current = by_name.get(layer.name, current)  # its own box or that of its input
        if layer.kind == "batch norm":
            _draw_box(panel, layer, (current.left, -0.045 * size), current.width, 0.03 * size)
        if layer.name == marked:
            marked_box = current
    _write_sizes(panel, boxes, size)
    if marked:
        _draw_marker(panel, marked, marked_box, size)
    right = max(box.left + box.width for box in boxes)
    heights = {box.height for box in boxes if box.layer.kind == "conv" and box.height >= size / 8}
    panel.set(xticks=[], yticks=[0, *heights], xlim=(-0.03, right + 0.01), ylim=(-0.16 * size, 1.28 * size))
    panel.set_ylabel("feature map size in pixels", fontsize=9)
    panel.set_xlabel("numbers below the boxes: channels (box width)", fontsize=9)
    panel.set_title(f"{anatomy.model}, {size} x {size} pixels", fontsize=10, loc="left", color=INK)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.spines["left"].set_bounds(0, size)
    panel.tick_params(colors=INK, labelsize=9)
    panel.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def _boxes(anatomy: Anatomy) -> list[Box]:
    maps = [layer for layer in anatomy if layer.kind in ("conv", "pool")]
    linear = [layer for layer in anatomy if layer.kind == "linear"]
    num_pools = sum(layer.kind == "pool" for layer in maps)
    gap, pool_width = min(GAP, 0.3 / max(1, len(maps))), min(POOL_WIDTH, 0.2 / max(1, num_pools))
    channels = sum(layer.output_shape[1] for layer in maps if layer.kind == "conv")
    available = 1 - gap * len(maps) - pool_width * num_pools
    boxes, left = [], 0.0
    for layer in maps:
        width = pool_width if layer.kind == "pool" else max(MIN_WIDTH, available * layer.output_shape[1] / channels)
        boxes.append(Box(layer, left, width, float(layer.output_shape[2])))
        left += width + gap
    # The first linear box is to the right of the last number written above a map.
    left = max([left + 4 * GAP, *(box.left + 1.3 * LETTER_WIDTH * len(box.size_label) for box in boxes[-2:])])
    max_features = max((layer.output_shape[-1] for layer in linear), default=1)
    for layer in linear:
        boxes.append(Box(layer, left, LINEAR_WIDTH, 0.6 * anatomy.image_size * layer.output_shape[-1] / max_features))
        left += LINEAR_WIDTH + 2 * GAP
    return boxes


def _draw_box(panel: Any, layer: Layer, corner: tuple[float, float], width: float, height: float) -> None:
    color, hatch, label = STYLES[layer.kind]
    box = Rectangle(corner, width, height, gid=layer.name, facecolor=color, hatch=hatch, edgecolor="white")
    box.set(linewidth=0.4, label=None if label in panel.get_legend_handles_labels()[1] else label)
    panel.add_patch(box)


def _write_sizes(panel: Any, boxes: Sequence[Box], size: int) -> None:
    """Write map sizes above the boxes, channels below the convolutions, and features above the linear layers."""
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # an arrow may pass behind
    text_style: dict[str, Any] = {"fontsize": 9, "color": INK, "zorder": 5, "bbox": background}
    end = level = 0.0  # right end and height of the last number
    for height, maps in groupby((box for box in boxes if box.layer.kind != "linear"), lambda box: box.height):
        box = next(maps)
        baseline = height + 0.015 * size
        if box.left < end and abs(baseline - level) < 0.08 * size:
            baseline = level + 0.08 * size
        panel.text(box.left, baseline, box.size_label, ha="left", va="bottom", **text_style)
        end, level = box.left + LETTER_WIDTH * len(box.size_label), baseline
    next_free = 0.0
    convolutions = [box for box in boxes if box.layer.kind == "conv"]
    for (channels, _), group in groupby(convolutions, lambda box: box.layer.output_shape[1:3]):
        same_shape, half_width = list(group), LETTER_WIDTH * len(str(channels)) / 2
        middle = (same_shape[0].left + same_shape[-1].left + same_shape[-1].width) / 2
        middle = max(middle, next_free + half_width)
        panel.text(middle, -0.06 * size, str(channels), ha="center", va="top", **text_style)
        next_free = middle + half_width + LETTER_WIDTH / 2
    for box in boxes:
        if box.layer.kind == "linear":
            position = (box.left + box.width / 2, box.height + 0.015 * size)
            panel.text(*position, str(box.layer.output_shape[-1]), rotation=90, ha="center", va="bottom", **text_style)


def _draw_marker(panel: Any, name: str, box: Box, size: int) -> None:
    middle = box.left + box.width / 2
    tip = box.height + (0.25 * size if box.layer.kind == "linear" else 0)  # above the number
    panel.add_patch(
        Rectangle((box.left, 0), box.width, box.height, fill=False, edgecolor=INK, linewidth=2.5, gid="mark")
    )
    side, relpos = ("left", (0, 0)) if middle < 0.5 else ("right", (1, 0))
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.5, "relpos": relpos}
    panel.annotate(
        name, (middle, tip), (middle, 1.15 * size), ha=side, va="bottom", fontsize=10, fontweight="bold", color=INK,
        arrowprops=arrow,
    )  # fmt: skip


def roofline(rows: Sequence[Layer], ceilings: Ceilings) -> NotebookFigure:
    """Plot measured layers under the roofline, on logarithmic axes: GFLOP/s of the forward pass against FLOP per byte.

    Only layers with multiply-adds are shown. A layer far below the roofline could be faster.

    Raises:
        UserError: no layer with multiply-adds in ``rows`` was measured.
    """
    shown = [row for row in rows if row.flop_per_second is not None]
    if not shown:
        raise UserError("nothing to draw under the roofline: no layer with multiply-adds was measured")
    figure, (panel,) = new_figure(1, 9.0, 5.0)
    shown.sort(key=lambda row: (row.intensity, row.flop_per_second))
    intensities = np.array([row.intensity for row in shown])
    speeds = [(row.flop_per_second or 0) / 1e9 for row in shown]
    peak, ridge = ceilings.flop_per_second / 1e9, ceilings.ridge
    left, right = min(ridge, *intensities) / 2, max(ridge, *intensities) * 2
    lowest = ceilings.attainable(left) / 1e9
    bandwidth = f"memory bandwidth, {ceilings.bytes_per_second / 1e9:.1f} GB/s"
    panel.plot([left, ridge], [lowest, peak], "--", color=GREEN, linewidth=2, label=bandwidth)
    panel.plot([ridge, right], [peak, peak], "-", color=PURPLE, linewidth=2, label=f"peak compute, {peak:.1f} GFLOP/s")
    for kind, marker, color in (("conv", "o", BLUE), ("linear", "s", ORANGE)):
        points = [(row.intensity, speed) for row, speed in zip(shown, speeds) if row.kind == kind]
        if points:
            panel.plot(*zip(*points), marker, color=color, markersize=7, alpha=0.8, label=kind)
    bottom = min(*speeds, lowest) / 30  # leaves space for the labels below the layers
    panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 3 * max(peak, *speeds)))
    panel.set(xlabel="arithmetic intensity in FLOP per byte", ylabel="forward pass in GFLOP/s")
    positions = _label_positions(np.log(intensities / left) / np.log(right / left))
    for row, speed, position in zip(shown, speeds, positions):
        panel.annotate(
            row.name, (row.intensity, speed), (position, 0.03), textcoords="axes fraction", rotation=90, fontsize=8,
            color=INK, ha="center", va="bottom",
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.5},
        )  # fmt: skip
    panel.legend(fontsize=9, frameon=False, loc="upper left")
    return figure


def _label_positions(preferred: Any) -> Any:
    """Return ascending positions that do not overlap: each is moved right past the previous one, left at the edge."""
    gap = min(LABEL_GAP, 1 / (len(preferred) + 1))
    offsets = gap * np.arange(len(preferred))
    limit = 1 - gap / 2 - offsets[-1]
    return offsets + np.minimum(np.maximum.accumulate(preferred - offsets), limit)
