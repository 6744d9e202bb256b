"""Figures of runs (``runs.py``), of a network (``network.py``) and of images (``features.py``)."""

# ruff: noqa: F401  # these are the names of vgglab.figures

from vgglab.view.figures.base import BLUE, COLOURS, DASHES, GREEN, GRID, INK, ORANGE, PURPLE, NotebookFigure, new_figure
from vgglab.view.figures.features import (
    bounding_box,
    heat_over,
    kernel_grid,
    map_rows,
    neighbour_rows,
    prediction_grid,
    receptive_fields,
)
from vgglab.view.figures.network import architecture, roofline
from vgglab.view.figures.runs import bands, curves, curves_beside, where_time_goes
