"""Explore a network layer by layer: cost, position, and receptive field on a photograph.

    >>> explore(vgglab.anatomy.of, photograph)

Shows widgets in a live notebook, and a figure with text in a headless one.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import numpy
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from vgglab.errors import UserError
from vgglab.settings.choices import MODELS
from vgglab.view.anatomy_table import Anatomy, Layer
from vgglab.view.figures.base import INK, ORANGE, NotebookFigure
from vgglab.view.figures.network import WIDTH, draw
from vgglab.view.live import front_end
from vgglab.view.tables import Table, html_text

NETWORKS = tuple(name for name in MODELS if not name.endswith("_bn"))
SMALLEST, LARGEST, STEP = 32, 448, 32  # image sizes on the slider, in pixels; five pooling layers halve them
HEIGHT = 6.4  # inches


def explore(
    anatomy_of: Callable[..., Anatomy], photograph: Any, model: str = "vgg16", image_size: int = 224, layer: str = ""
) -> None:
    """Show an interactive explorer of the network's layers, or only its initial view if the front end has no widgets.

    Args:
        anatomy_of: ``vgglab.anatomy.of``, or a function with the same arguments.
        photograph: a path, or a uint8 array ``(height, width, 3)``; the central square is shown.
        model: one of ``settings.choices.MODELS``, e.g. ``vgg16`` or ``vgg16_bn``.
        image_size: side of the images in pixels.
        layer: the layer shown first; "" for the last convolution.

    Raises:
        UserError: the photograph cannot be read, or the model or layer does not exist.
    """
    explorer = Explorer(anatomy_of, photograph, model, image_size, layer)
    kind = front_end()
    if kind == "terminal":
        print(explorer.table())
        return
    from IPython.display import display

    if kind == "live":
        display(explorer.widget())
    else:
        display(explorer.picture(), explorer.table())


class Explorer:
    """The selected layer of a network, shown as a figure, a table and text."""

    def __init__(
        self, anatomy_of: Callable[..., Anatomy], photograph: Any, model: str, image_size: int, layer: str = ""
    ) -> None:
        self._anatomy_of, self._photograph = lru_cache(maxsize=None)(anatomy_of), _read(photograph)
        self._lock = threading.RLock()  # a front end may run callbacks on two threads at once
        self._is_updating = False
        self.choose(model, image_size, layer)

    def choose(self, model: str, image_size: int, layer: str = "") -> None:
        """Select a network, an image size and a layer; "" selects the last convolution.

        Raises:
            UserError: a type is wrong, ``vgglab.anatomy.of`` rejects the values, or the layer does not exist.
        """
        if not isinstance(model, str) or isinstance(image_size, bool) or not isinstance(image_size, int):
            raise UserError(
                f"explore: expects the name of a network and a whole number of pixels, not {model!r} and {image_size!r}"
            )
        self.anatomy = self._anatomy_of(model, image_size)
        found = [row for row in self.anatomy if (row.name == layer if layer else row.kind == "conv")]
        if not found:
            first, last = self.anatomy[0].name, self.anatomy[-1].name
            raise UserError(f"layer: {model} has no {layer!r}; its layers go from {first} to {last}")
        self.layer = found[-1]

    def table(self) -> Table:
        layer, anatomy = self.layer, self.anatomy
        parameters, operations = layer.num_parameters, layer.multiply_adds
        field = f"{layer.receptive_field} x {layer.receptive_field} pixels"
        if layer.receptive_field > anatomy.image_size:
            field += ", larger than the image; the rest is padding"
        stride = f"{layer.jump} pixel{'s' * (layer.jump > 1)}"
        if len(layer.output_shape) == 2:
            stride = "none: each output sees the whole image"
        shapes = ["x".join(map(str, shape[1:])) for shape in (layer.input_shape, layer.output_shape)]
        share_of_operations = f"{operations / anatomy.multiply_adds:.1%} of the total"
        rows = [
            ["layer", f"{layer.name}, {layer.kind}"],
            ["shape", " to ".join(shapes)],
            ["parameters", f"{parameters:,}, {parameters / anatomy.num_parameters:.1%} of the total"],
            ["multiply-adds", f"{operations / 1e6:,.1f} million, {share_of_operations}"],
            ["activation memory", f"{layer.activation_bytes / 1e6:,.3f} MB per image, in float32"],
            ["receptive field", field],
            ["effective stride", stride],
        ]
        return Table([anatomy.model, f"{anatomy.image_size} pixels"], rows)

    def picture(self) -> NotebookFigure:
        """Draw the photograph with the receptive field of the central output and, below it, the network."""
        picture = NotebookFigure(WIDTH, HEIGHT)
        upper, lower = picture.subplots(2, 1, height_ratios=[1, 1.1])
        self._draw_field(upper)
        draw(lower, self.anatomy, self.layer.name)
        return picture

    def _draw_field(self, panel: Any) -> None:
        size, (height, width) = self.anatomy.image_size, self.layer.output_shape[2:] or (1, 1)
        frame = self.layer.window(height // 2, width // 2)  # of the central output
        photograph = ImageOps.fit(self._photograph, (size, size))
        panel.imshow(photograph, extent=(0, size, size, 0), interpolation="nearest")

        def draw_square(left: int, **style: Any) -> None:
            panel.add_patch(Rectangle((left, frame.top), frame.side, frame.side, fill=False, **style))

        if width > 1:
            draw_square(frame.left - self.layer.jump, color="white", linestyle="--")
        draw_square(frame.left, color="white", linewidth=4.5)  # visible on any photograph
        draw_square(frame.left, color=ORANGE, linewidth=2.5)
        low, high = min(0, frame.left, frame.top), max(size, frame.left + frame.side, frame.top + frame.side)
        margin = 0.03 * (high - low)
        panel.set(xlim=(low - margin, high + margin), ylim=(high + margin, low - margin), facecolor="#EEEEEE")
        panel.set_xlabel("pixels" + ("; grey is padding" if low < 0 or high > size else ""), fontsize=9)
        title = f"orange: receptive field of a {self.layer.name} output"
        title += ";\ndashed: that of the output to its left" if width > 1 else ""
        panel.set_title(title, fontsize=9, color=INK)
        panel.tick_params(colors=INK, labelsize=9)

    def widget(self) -> Any:
        """Return controls, figure and table; usable with Tab and the arrow keys (the space bar opens a list)."""
        import ipywidgets as widgets

        look = {"style": {"description_width": "initial"}, "layout": widgets.Layout(width="auto", max_width="34em")}
        model, size = self.anatomy.model, self.anatomy.image_size
        self.network = widgets.Dropdown(options=NETWORKS, value=model.replace("_bn", ""), description="network", **look)
        self.batch_norm = widgets.Checkbox(model.endswith("_bn"), description="batch norm", indent=False, **look)
        largest = max(LARGEST, size)
        self.image_size = widgets.IntSlider(
            size, SMALLEST, largest, STEP, description="image size in pixels", continuous_update=False, **look
        )
        self.layers = widgets.Dropdown(options=self._options(), value=self.layer.name, description="layer", **look)
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.about = widgets.HTML()
        controls = [self.network, self.batch_norm, self.image_size, self.layers]
        for control in controls:
            control.observe(self._on_change, "value")
        self._refresh()
        side = widgets.VBox([*controls, self.about], layout=widgets.Layout(max_width="100%"))
        return widgets.Box([side, self.image], layout=widgets.Layout(flex_flow="row wrap"))

    def _options(self) -> list[tuple[str, str]]:
        return [(f"{index} of {len(self.anatomy)}: {layer.name}, {layer.kind}", layer.name)
                for index, layer in enumerate(self.anatomy, start=1)]  # fmt: skip

    def _on_change(self, _: Any) -> None:
        with self._lock:
            if self._is_updating:  # _apply_controls sets the layer control, which calls this again
                return
            self._is_updating = True
            try:
                self._apply_controls()
            except UserError as error:
                self.about.value = html_text(str(error))
            finally:
                self._is_updating = False

    def _apply_controls(self) -> None:
        model = self.network.value + "_bn" * self.batch_norm.value
        if (model, self.image_size.value) == (self.anatomy.model, self.anatomy.image_size):
            self.choose(model, self.image_size.value, self.layers.value)
        else:
            previous = self.anatomy, self.layer
            self.choose(model, self.image_size.value)
            self.layer = _counterpart(*previous, self.anatomy) or self.layer
            self.layers.options = self._options()
            self.layers.value = self.layer.name
        self._refresh()

    def _refresh(self) -> None:
        self.image.value, self.about.value = self.picture().png(), self.table()._repr_html_()


def _counterpart(old: Anatomy, layer: Layer, new: Anatomy) -> Layer | None:
    """Return the corresponding layer of another network: the same kind and number, or else the last of that kind."""
    index = [row.name for row in old if row.kind == layer.kind].index(layer.name)
    same_kind = [row for row in new if row.kind == layer.kind]
    return same_kind[min(index, len(same_kind) - 1)] if same_kind else None


def _read(photograph: Any) -> Any:
    """Return the photograph as a Pillow image."""
    try:
        is_file = isinstance(photograph, (str, Path))
        image = Image.open(photograph) if is_file else Image.fromarray(numpy.asarray(photograph))
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, TypeError, ValueError, AttributeError, Image.DecompressionBombError) as error:
        expected = "must be a path or a uint8 array (height, width, 3)"
        raise UserError(f"photograph: {expected}; reading it failed: {error}") from error
