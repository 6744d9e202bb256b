"""How long each notebook takes on its rung ``quick``, all of them timed on one machine.

``python tests/time_notebooks.py`` measures them and prints this table to paste. ``vgglab/yardstick.py`` compares the
machine at hand with the one that is named here.
"""

from __future__ import annotations

MACHINE = "two cores of an Intel Xeon at 2.8 GHz, November 2026"

# Medians of the two measurements of ``vgglab.yardstick``, on that machine while nothing else ran.
STEP_SECONDS, COMPILE_SECONDS = 0.1, 0.025

# Each executed alone from its first cell to its last, the start of its kernel included.
SECONDS = {
    "00_start_here": 81,
    "01_architecture": 15,
    "02_data": 65,
    "03_performance": 118,
    "04_convergence": 305,
    "05_many_cards": 134,
    "06_gcu": 49,
    "07_what_vgg_sees": 98,
    "08_report": 46,
}
