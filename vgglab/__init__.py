"""vgglab: a tutorial and lab kit for VGG16, on a laptop or on many cards.

    >>> import vgglab as vl
    >>> run = vl.launch("--data-path digits --model vgg11_bn --epochs 2")
    >>> vl.Run("runs/<name>").watch()

Notebooks and scripts import only the names below; everything else is internal and may change. Most of them are
loaded on first use: importing this package imports neither torch nor matplotlib, so run directories can be read on a
machine without them.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from vgglab.errors import RunFailed, UserError
from vgglab.version import __version__

# `launch` is both a module and a function; after this import, the name always refers to the function.
from vgglab.launch import launch  # isort: skip
from vgglab.view.display import NotebookRun as Run, NotebookSeeds as Seeds, Runs  # isort: skip

# Lets ``python -m vgglab.plan`` and similar commands find their modules in commands/.
__path__.append(os.path.join(os.path.dirname(__file__), "commands"))

# Where the names loaded on first use are defined: ``module:name`` for a function or class, ``module`` for a module.
_ELSEWHERE = {
    "Profiles": "vgglab.lab.profiles:Profiles",
    "anatomy": "vgglab.lab.anatomy",
    "check_machine": "vgglab.commands.doctor:check_machine",
    "choose_photograph": "vgglab.view.photograph_chooser:choose_photograph",
    "compare_runs": "vgglab.runs.compare:compare_runs",
    "data": "vgglab.data",
    "experiments": "vgglab.lab.experiments",
    "explore": "vgglab.view.explorer:explore",
    "features": "vgglab.lab.features",
    "figures": "vgglab.view.figures",
    "load_lazy_double": "vgglab.devices.doubles:load_lazy",
    "load_network": "vgglab.lab.predictions:load_network",
    "measure_loading": "vgglab.lab.bench.data:measure_loading",
    "measure_steps": "vgglab.lab.bench.step:measure_steps",
    "metric": "vgglab.view.summaries:metric",
    "model": "vgglab.model",
    "open_device": "vgglab.devices:open_device",
    "parse_flags": "vgglab.settings.parser:parse_flags",
    "plan_training": "vgglab.lab.plan:plan_training",
    "predict": "vgglab.lab.predictions:predict",
    "save_steps": "vgglab.lab.bench.step:save_steps",
    "sim": "vgglab.devices.sim",
    "tables": "vgglab.view.run_tables",
}
__all__ = ["Run", "RunFailed", "Runs", "Seeds", "UserError", "__version__", "launch", *_ELSEWHERE]


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'vgglab' has no attribute {name!r}")
    module, _, attribute = _ELSEWHERE[name].partition(":")
    imported = importlib.import_module(module)
    return getattr(imported, attribute) if attribute else imported


def __dir__() -> list[str]:
    return sorted(__all__)
