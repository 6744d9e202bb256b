"""Figures of runs (``runs.py``), of a network (``network.py``) and of its features (``features.py``)."""

from vgglab.view.figures.base import BLUE, COLOURS, DASHES, GREEN, GRID, INK, ORANGE, PURPLE, NotebookFigure, new_figure
from vgglab.view.figures.features import (
    bounding_box,
    heat_over,
    kernel_grid,
    map_rows,
    neighbour_rows,
    receptive_fields,
)
from vgglab.view.figures.network import architecture, roofline
from vgglab.view.figures.runs import bands, curves, curves_beside, prediction_grid, where_time_goes

__all__ = [
    "BLUE", "COLOURS", "DASHES", "GREEN", "GRID", "INK", "ORANGE", "PURPLE", "NotebookFigure", "architecture", "bands",
    "bounding_box", "curves", "curves_beside", "heat_over", "kernel_grid", "map_rows", "neighbour_rows", "new_figure",
    "prediction_grid", "receptive_fields", "roofline", "where_time_goes",
]  # fmt: skip
