"""vgglab: a tutorial and lab kit for VGG16, from a laptop to a machine full of cards.

    >>> import vgglab
    >>> run = vgglab.launch("--data-path digits --model vgg11_bn --epochs 2")
    >>> vgglab.Run("runs/<name>").watch()

Importing this package imports neither torch nor matplotlib, so that a run can be looked at where only its
directory has been copied; ``model``, ``anatomy`` and ``predict`` bring torch in when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from vgglab.errors import RunFailed, UserError
from vgglab.version import __version__

# `launch` is a module and a function: imported here, the name means the function for good.
from vgglab.launch import launch  # isort: skip
from vgglab.runs import Run  # isort: skip
from vgglab.seeds import Seeds  # isort: skip

__all__ = ["Run", "RunFailed", "Seeds", "UserError", "__version__", "anatomy", "launch", "model", "predict"]


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext vgglab``: from then on there is ``%vgglab`` (``%vgglab?`` tells more)."""
    importlib.import_module("vgglab.magics").load(shell)


def __getattr__(name: str) -> Any:
    if name in ("anatomy", "model"):
        return importlib.import_module(f"vgglab.{name}")
    if name == "predict":
        return importlib.import_module("vgglab.predictions").predict
    raise AttributeError(f"module 'vgglab' has no attribute {name!r}")
