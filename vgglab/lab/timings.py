"""How long each notebook takes with the profile ``quick``, each executed alone, all of them on one machine.

``timings.json`` is written by ``python tests/time_notebooks.py "name of the machine"``; besides the seconds it has the
two measurements by which ``vgglab/lab/machine_speed.py`` compares the machine at hand with that one.
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
