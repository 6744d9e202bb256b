"""Profiles: the size of a notebook run (``quick``, ``small`` or ``full``), shown with the expected time.

Parameter values set by hand or with papermill are checked here before training.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

from vgglab.errors import UserError
from vgglab.lab.machine_speed import REFERENCE, slowdown
from vgglab.view.progress import duration
from vgglab.view.tables import Table, show

NAMES = ("quick", "small", "full")
ALL = -1  # as a number of steps: no limit


class Profiles:
    """The values of a notebook's parameters in each profile.

    >>> profiles = Profiles("00_start_here", model=("vgg11_bn", "vgg16_bn", "vgg16"), epochs=(2, 6, 90))
    >>> model, epochs = profiles.choose("small", model=None, epochs=3)  # "vgg16_bn", 3
    """

    def __init__(
        self,
        notebook: str,
        at_least: Mapping[str, int] | None = None,
        one_of: Mapping[str, Sequence[str]] | None = None,
        **settings: tuple[Any, ...],
    ) -> None:
        """
        Args:
            notebook: name of the notebook without ``.ipynb``, to look up its running time.
            at_least: minimum values of integer parameters, by name; the default is 1.
            one_of: allowed values of text parameters, by name.
            settings: the values for the three profiles, by parameter name.
        """
        self.settings, self.at_least, self.one_of = settings, at_least or {}, one_of or {}
        self.seconds: float | None = REFERENCE["seconds"].get(notebook)

    def choose(self, profile: str, **given: Any) -> list[Any]:
        """Show the profile table and return the profile's values, overridden by those in ``given`` that are not None.

        The values are returned in the order of ``given``. A value must have the same type as in the profiles: text, an
        integer (-1, meaning all, only if a profile has it), or, if a profile has a decimal, any number above 0.

        Raises:
            UserError: an unknown profile or an invalid value; the message names the parameter.
        """
        if profile not in NAMES:
            raise UserError(f"profile: {profile!r} is not one of {', '.join(NAMES)}")
        index = NAMES.index(profile)
        overrides = {name: self._checked(name, value) for name, value in given.items() if value is not None}
        chosen = {name: overrides.get(name, self.settings[name][index]) for name in given}
        show(self._table(index, overrides))
        return list(chosen.values())

    def _checked(self, name: str, value: Any) -> Any:
        values = self.settings[name]
        if all(isinstance(item, str) for item in values):
            value = str(value)  # papermill reads -p data_path 2026 as a number
            if value not in self.one_of.get(name, [value]):
                raise UserError(f"{name}: {value!r} is not one of {', '.join(self.one_of[name])}")
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if any(isinstance(item, float) for item in values):
            if is_number and 0 < value < math.inf:
                return value
            raise UserError(f"{name}: {value!r} is not a number above 0")
        minimum, allows_all = self.at_least.get(name, 1), ALL in values
        if is_number and isinstance(value, int) and (value >= minimum or (allows_all and value == ALL)):
            return value
        allowed = f"a whole number of at least {minimum}"
        problem = f"neither -1 (all) nor {allowed}" if allows_all else f"not {allowed}"
        raise UserError(f"{name}: {value!r} is {problem}")

    def _table(self, selected: int, overrides: Mapping[str, Any]) -> Table:
        """Return a table that marks the selected profile and the values set by hand, and gives the expected time."""
        headings = ["", *NAMES]
        headings[1 + selected] += " (selected)"
        rows = []
        for name, values in self.settings.items():
            cells = [str(value) for value in values]
            if name in overrides:
                cells[selected] = f"{overrides[name]} (set by hand)"
            rows.append([name, *cells])
        expected, remark = "not timed", ""
        if self.seconds is not None:
            factor = slowdown()
            expected = f"about {duration(_rounded(self.seconds * factor))}"
            remark = (
                f"The expected time is an estimate: the notebook took {duration(self.seconds)} on "
                f"{REFERENCE['machine']}, and a short benchmark took {factor:.1f} times as long here."
            )
        if overrides:
            remark += " The expected time does not account for values set by hand."
        rows.append(["expected time", expected, *["not timed"] * (len(NAMES) - 1)])
        return Table(headings, rows, note=remark.strip())


def _rounded(seconds: float) -> float:
    """Round an estimate: to 5 s below a minute, to 10 s below five minutes, otherwise to half a minute."""
    step = 5 if seconds < 60 else 10 if seconds < 300 else 30
    return step * max(1, round(seconds / step))
