"""vgglab: a tutorial and lab kit for VGG16, from a laptop to a machine full of cards.

    >>> import vgglab
    >>> run = vgglab.launch("--data-path digits --model vgg11_bn --epochs 2")
    >>> vgglab.Run("runs/<name>").watch()

Importing this package imports neither torch nor matplotlib, so that a run can be looked at where only its
directory has been copied; ``model``, ``anatomy`` and ``predict`` bring torch in when they are first used.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from vgglab.errors import RunFailed, UserError
from vgglab.version import __version__

# `launch` is a module and a function: imported here, the name means the function for good.
from vgglab.launch import launch  # isort: skip
from vgglab.runs.run import Run  # isort: skip
from vgglab.runs.folder import Runs  # isort: skip
from vgglab.runs.seeds import Seeds  # isort: skip

# ``python -m vgglab.plan`` and its like are found in commands/.
__path__.append(os.path.join(os.path.dirname(__file__), "commands"))

__all__ = ["Run", "RunFailed", "Runs", "Seeds", "UserError", "__version__", "anatomy", "launch", "model", "predict"]


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext vgglab``: from then on there is ``%vgglab`` (``%vgglab?`` tells more)."""
    importlib.import_module("vgglab.commands.magics").load(shell)


def __getattr__(name: str) -> Any:
    if name == "anatomy":
        return importlib.import_module("vgglab.lab.anatomy")
    if name == "model":
        return importlib.import_module("vgglab.model")
    if name == "predict":
        return importlib.import_module("vgglab.lab.predictions").predict
    raise AttributeError(f"module 'vgglab' has no attribute {name!r}")
