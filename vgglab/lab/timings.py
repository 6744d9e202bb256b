"""The running time of each notebook with the profile ``quick``, on the reference machine with nothing else running.

``python tests/time_notebooks.py "name of the machine"`` writes ``timings.json``. That file also contains the two
measurements of the reference machine with which ``vgglab/lab/machine_speed.py`` compares the current machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_content: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
MACHINE: str = _content["machine"]
STEP_SECONDS: float = _content["step_seconds"]
COMPILE_SECONDS: float = _content["compile_seconds"]
SECONDS: dict[str, float] = _content["seconds"]
