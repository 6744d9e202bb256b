"""Shared by all figures: colours, panels, and display in a notebook.

Figures use ``matplotlib.figure.Figure`` and never pyplot, which is not safe in the dashboard's thread.
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

# Okabe and Ito's palette: distinguishable with any colour vision. Lines also differ in dash pattern or marker.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, GRID = "#333333", "#DDDDDD"
DASHES = ("-", "--", ":", "-.")
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
MAX_DESCRIBED_PANELS = 10  # panels described in the alternative text


class NotebookFigure(Figure):
    """A figure that notebooks show without pyplot."""

    def __init__(self, width: float, height: float) -> None:
        """Create a figure; sizes in inches."""
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def draw(self, renderer: Any) -> None:
        """Draw as usual, but do not interpret ``$`` in names of runs or classes as mathtext.

        Tick labels of logarithmic axes are an exception, because matplotlib writes powers of ten as formulas.
        """
        axes = [axis for panel in self.axes for axis in (panel.xaxis, panel.yaxis) if axis.get_scale() == "log"]
        powers = {text for axis in axes for text in (*axis.get_majorticklabels(), *axis.get_minorticklabels())}
        for text in self.findobj(Text):
            text.set_parse_math(text in powers)
        super().draw(renderer)

    def png(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=96)
        return file.getvalue()

    def alt_text(self) -> str:
        """Return the alternative text for screen readers: title, axes and legend of each panel."""
        distinct = [text for text in dict.fromkeys(map(_describe, self.axes)) if text and not text.isdigit()]
        described = distinct[:MAX_DESCRIBED_PANELS]
        if len(distinct) > len(described):
            described.append(f"and {len(distinct) - len(described)} more")
        return "; ".join(described) or f"figure with {len(self.axes)} panels"

    def __repr__(self) -> str:
        return f"NotebookFigure({self.alt_text()})"

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # Not _repr_png_, which IPython ignores once pyplot has been imported.
        return {"image/png": self.png(), "text/plain": repr(self)}, {"image/png": {"alt": self.alt_text()}}


def _describe(panel: Any) -> str:
    axes = " over ".join(filter(None, [panel.get_ylabel(), panel.get_xlabel()]))
    names = ", ".join(dict.fromkeys(panel.get_legend_handles_labels()[1]))
    description = ": ".join(filter(None, [panel.get_title(), axes])) + f" ({names})" * bool(names)
    return " ".join(description.split())


def new_figure(num_panels: int, width: float = 9.0, height: float = 3.2) -> tuple[NotebookFigure, list[Any]]:
    """Create a figure with panels side by side; sizes in inches."""
    figure = NotebookFigure(width, height)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for panel in panels:
        panel.grid(True, color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.set_prop_cycle(color=COLOURS)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, labelsize=9)
    return figure, panels


def image_grid(num_panels: int, num_columns: int, width: float, height: float) -> tuple[NotebookFigure, Any]:
    """Create a figure with rows of panels for images, without ticks; ``width`` and ``height`` of a panel in inches."""
    num_rows = max(1, -(-num_panels // num_columns))
    figure = NotebookFigure(width * num_columns, height * num_rows)
    panels = figure.subplots(num_rows, num_columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for panel in panels.flat:
        panel.spines[:].set(color=GRID)
    for panel in panels.flat[num_panels:]:
        panel.set_axis_off()
    return figure, panels


def mark(panel: Any, is_right: bool, text: str, frame: str) -> None:
    """Put ``text`` above an image: with ✓ and a thin frame if ``is_right``, else with ✗ and a thick orange one."""
    panel.set_title(f"{'✓' if is_right else '✗'} {text}", fontsize=9, color=INK if is_right else ORANGE)
    panel.spines[:].set(color=frame if is_right else ORANGE, linewidth=1 if is_right else 3)
