"""Figures of images: kernels, feature maps, heat maps over photographs, nearest neighbours, predictions.

Images are uint8 arrays ``(H, W, 3)``; maps are ``(channels, h, w)``; heat maps are ``(H, W)`` or smaller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from vgglab.view.figures.base import BLUE, GREEN, GRID, INK, ORANGE, NotebookFigure, image_grid, mark

if TYPE_CHECKING:
    from vgglab.lab.predictions import Prediction


def kernel_grid(kernels: Any, num_columns: int = 16) -> NotebookFigure:
    """Show first-layer kernels ``(K, 3, h, w)`` as colour images, each scaled from its minimum to its maximum."""
    kernels = np.asarray(kernels).transpose(0, 2, 3, 1)  # (K, h, w, 3)
    lowest, highest = kernels.min(axis=(1, 2, 3), keepdims=True), kernels.max(axis=(1, 2, 3), keepdims=True)
    images = (kernels - lowest) / np.maximum(highest - lowest, 1e-12)
    figure, panels = image_grid(len(images), num_columns, 0.55, 0.62)
    for number, (panel, image) in enumerate(zip(panels.flat, images)):
        panel.imshow(image)
        panel.set_xlabel(number, fontsize=7, labelpad=1)
    return figure


def map_rows(maps: Mapping[str, Any], image: Any, num_maps: int = 5) -> NotebookFigure:
    """Show the image at the top left, and one row per layer: the ``num_maps`` channels that vary most across the image.

    Axes are in pixels of the map; each map is scaled from 0 (black) to its maximum.
    """
    height, width = np.asarray(image).shape[:2]
    figure = NotebookFigure(9.6, len(maps) * (8.4 / (num_maps + 1) * height / width + 0.42))
    panels = figure.subplots(len(maps), num_maps + 1, squeeze=False)
    panels[0][0].imshow(np.asarray(image))
    for row, (name, channels) in zip(panels, maps.items()):
        channels = np.asarray(channels)
        rows, columns = channels.shape[1:]
        row[0].set_axis_off()
        row[1].set_ylabel(f"{name}\n{rows} × {columns}", fontsize=9, color=INK)
        for panel, channel in zip(row[1:], channels.std(axis=(1, 2)).argsort()[::-1]):
            panel.imshow(channels[channel], cmap="gray", vmin=0)
            panel.set_title(f"channel {channel}", fontsize=8, color=INK, pad=3)
            panel.set(xticks=[0, columns - 1], yticks=[0, rows - 1])
            panel.tick_params(labelsize=7, colors=INK, pad=1)
    panels[-1][1].set_xlabel("pixels of the map", fontsize=7, color=INK)
    return figure


def heat_over(images: Sequence[Any], heats: Mapping[str, Sequence[Any]], titles: Sequence[str]) -> NotebookFigure:
    """Show the images in the first row; below it, one row per kind of heat map, drawn over the images.

    Each heat map is resized to its image. The colours span the range of that map; a colour bar shows the scale.
    """
    num_columns, num_rows = len(images), 1 + len(heats)
    width = min(9.6, 2.1 * num_columns + 0.8)
    figure, rows = image_grid(num_columns * num_rows, num_columns, width / num_columns, 1.62)
    for column, (image, title) in enumerate(zip(map(np.asarray, images), titles)):
        rows[0, column].imshow(image)
        rows[0, column].set_title(title, fontsize=9, color=INK)
        extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        for panel, heat in zip(rows[1:, column], heats.values()):
            panel.imshow(_grey(image), cmap="gray", vmin=0, vmax=255)
            heatmap = panel.imshow(heat[column], cmap="viridis", alpha=0.6, extent=extent, interpolation="bilinear")
            lowest, highest = heatmap.get_clim()
            if lowest < highest:
                figure.colorbar(heatmap, ax=panel, shrink=0.9, pad=0.03).ax.tick_params(labelsize=7, colors=INK)
            else:  # a colour bar would show a range that does not exist
                panel.set_xlabel(f"{lowest:.2g} everywhere", fontsize=7, color=INK)
    for panel, name in zip(rows[1:, 0], heats):
        panel.set_ylabel(name, fontsize=8, color=INK)
    return figure


def receptive_fields(image: Any, fields: Mapping[str, Any]) -> NotebookFigure:
    """Mark on the image the pixels that affect the centre unit of each layer; a frame shows their extent.

    ``fields`` maps the name of each layer to an array ``(H, W)`` with sum 1, which
    ``features.effective_receptive_fields`` computes for each image. Its square root is drawn, to make weak influence
    visible. Axes are in pixels of the image.
    """
    boxes = [bounding_box(field) for field in fields.values()]
    largest = max(boxes, key=lambda box: box[2] - box[0])
    margin = (largest[2] - largest[0]) // 4
    figure = NotebookFigure(9.6, 9.6 / len(fields) + 0.5)
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    for panel, (name, field), (top, left, bottom, right) in zip(panels, fields.items(), boxes):
        panel.imshow(160 + _grey(image) * (95 / 255), cmap="gray", vmin=0, vmax=255)
        field = np.asarray(field)
        colour = np.broadcast_to(to_rgb(ORANGE), (*field.shape, 3))
        panel.imshow(np.dstack([colour, np.sqrt(field / max(field.max(), 1e-30))]))
        size = (right - left, bottom - top)
        panel.add_patch(Rectangle((left - 0.5, top - 0.5), *size, fill=False, edgecolor=BLUE, linewidth=1.5))
        panel.set(xlim=(largest[1] - margin, largest[3] + margin), ylim=(largest[2] + margin, largest[0] - margin))
        panel.set_title(f"{name}: {size[0]} × {size[1]}", fontsize=9, color=INK)
        panel.set_xlabel("pixels", fontsize=8, color=INK)
        panel.tick_params(labelsize=7, colors=INK)
    return figure


def _grey(image: Any) -> Any:
    return np.asarray(image).mean(axis=2)


def bounding_box(field: Any) -> tuple[int, int, int, int]:
    """Return the smallest box around all non-zero values: top, left, bottom, right; the last two are exclusive."""
    rows, columns = np.nonzero(np.asarray(field))
    if not len(rows):
        return 0, 0, 0, 0
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def neighbour_rows(
    images: Sequence[Any], meanings: Sequence[str], rows: Sequence[tuple[str, int, Sequence[int]]]
) -> NotebookFigure:
    """Show one row per (criterion, index of an image, indices of its neighbours); ``meanings`` are the captions.

    A neighbour whose caption differs from that of the query image gets a cross and a thick orange frame.
    """
    num_columns = 1 + max(len(indices) for _, _, indices in rows)
    figure, panels = image_grid(num_columns * len(rows), num_columns, 1.25, 1.5)
    for (first, *others), (criterion, query, indices) in zip(panels, rows):
        first.imshow(np.asarray(images[query]))
        first.set_title(meanings[query], fontsize=9, color=INK, fontweight="bold")
        first.set_ylabel(f"by {criterion}", fontsize=9, color=INK)
        first.spines[:].set(color=INK, linewidth=2)
        for panel, index in zip(others, indices):
            panel.imshow(np.asarray(images[index]))
            mark(panel, meanings[index] == meanings[query], meanings[index], GREEN)
        for panel in others[len(indices) :]:
            panel.set_axis_off()
    return figure


def prediction_grid(predictions: Sequence[Prediction], num_columns: int = 6) -> NotebookFigure:
    """Show images with their predictions; wrong ones have an orange frame, a cross and the true class."""
    figure, panels = image_grid(len(predictions), num_columns, 1.5, 1.85)
    for panel, prediction in zip(panels.flat, predictions):
        panel.imshow(prediction.pixels())
        text = f"{prediction.predicted}, {prediction.probability:.0%}"
        if not prediction.is_right:
            text += f"\n(actually {prediction.actual})"
        mark(panel, prediction.is_right, text, GRID)
    return figure
