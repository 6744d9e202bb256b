"""Gives networks few channels in new interpreters with this folder on their ``PYTHONPATH``; see the fixture narrow.

Nothing is imported early: the numbers are changed after vgglab.model has been imported as usual.
"""

import json
import os
import sys


class NarrowModel:
    """Finds ``vgglab.model`` and changes it after its import."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "vgglab.model":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_narrow(module):
            execute(module)
            module.CONFIGURATIONS.update(json.loads(os.environ["VGGLAB_TESTS_NARROW"]))

        spec.loader.exec_module = execute_and_narrow
        return spec


if "VGGLAB_TESTS_NARROW" in os.environ:
    sys.meta_path.insert(0, NarrowModel)
