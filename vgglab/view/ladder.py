"""How large a notebook runs: ``quick``, ``small`` or ``full``, shown with the expected time before it starts.

What a person or a batch run has set by hand is checked here, before anything is trained.
"""

from __future__ import annotations

import math
from typing import Any, Mapping

from vgglab.errors import UserError
from vgglab.view.progress import duration
from vgglab.view.tables import html_table, html_text, text_table
from vgglab.view.timings import MACHINE, SECONDS

RUNGS = ("quick", "small", "full")
ALL = -1  # of steps: no limit


class Ladder:
    """What each rung sets, by the name of the notebook's parameter.

    >>> ladder = Ladder("00_start_here", slowdown(), model=("vgg11_bn", "vgg16_bn", "vgg16"), epochs=(2, 6, 90))
    >>> model, epochs = ladder.choose("small", model=None, epochs=3)  # "vgg16_bn", 3
    """

    def __init__(self, notebook: str, slowdown: float = 1.0, **settings: tuple[Any, ...]) -> None:
        """``slowdown``: how many times as long things take here as on the machine where ``quick`` was timed."""
        self.settings, self.slowdown = settings, slowdown
        self.seconds: float | None = SECONDS.get(notebook)

    def choose(self, profile: str, **given: Any) -> list[Any]:
        """A rung's settings, in the order of ``given``, whose own values win unless they are None; shows the table.

        A value has to be of its rungs' kind: text, a whole number of at least 1 (or -1 for all, if a rung has that),
        or a number above 0 where the rungs have fractions.

        Raises:
            UserError: no rung of that name; a value that makes no sense, by the parameter's name.
        """
        if profile not in RUNGS:
            raise UserError(f"profile: {profile!r} is not one of {', '.join(RUNGS)}")
        place = RUNGS.index(profile)
        by_hand = {name: _checked(name, own, self.settings[name]) for name, own in given.items() if own is not None}
        chosen = {name: by_hand.get(name, self.settings[name][place]) for name in given}
        table = LadderTable(self, place, chosen, set(by_hand))
        try:
            from IPython.display import display
        except ImportError:
            print(table)
        else:
            display(table)
        return list(chosen.values())


def _checked(name: str, value: Any, rungs: tuple[Any, ...]) -> Any:
    if all(isinstance(one, str) for one in rungs):
        return str(value)  # papermill reads -p data_path 2026 as a number
    if any(isinstance(one, float) for one in rungs):
        return number(name, value)
    return whole(name, value, or_all=ALL in rungs)


def whole(name: str, value: Any, least: int = 1, or_all: bool = False) -> int:
    """``value``, if it is a whole number of at least ``least``, or -1 with ``or_all``. Raises UserError."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and (value >= least or (or_all and value == ALL)):
        return value
    raise UserError(f"{name}: {value!r} is not a whole number of at least {least}" + ", or -1 for all" * or_all)


def number(name: str, value: Any) -> float:
    """``value``, if it is a number above 0. Raises UserError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf:
        return value
    raise UserError(f"{name}: {value!r} is not a number above 0")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """``value``, if it is one of ``choices``. Raises UserError."""
    if value not in choices:
        raise UserError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    return str(value)


class LadderTable:
    """The rungs side by side, the chosen one marked, what was set by hand in its place, and the expected time."""

    def __init__(self, ladder: Ladder, place: int, chosen: Mapping[str, Any], by_hand: set[str]) -> None:
        self.headings = ["", *(f"{rung} (selected)" if n == place else rung for n, rung in enumerate(RUNGS))]
        self.rows = []
        for name, values in ladder.settings.items():
            cells = [str(value) for value in values]
            if name in by_hand:
                cells[place] = f"{chosen[name]} (set by hand)"
            self.rows.append([name, *cells])
        self.remark = ""
        expected = "not timed"
        if ladder.seconds is not None:
            expected = f"about {duration(_rounded(ladder.seconds * ladder.slowdown))}"
            self.remark = (
                f"The expected time is an estimate for this machine: {duration(ladder.seconds)} on {MACHINE}, and a "
                f"short measurement took {ladder.slowdown:.1f} times as long here."
            )
        self.rows.append(["expected time", expected, *["not timed"] * (len(RUNGS) - 1)])
        if by_hand:
            self.remark += " What was set by hand changes the time."

    def __repr__(self) -> str:
        return f"{text_table(self.headings, self.rows)}\n{self.remark}".rstrip()

    def _repr_html_(self) -> str:
        return f"{html_table(self.headings, self.rows)}{html_text(self.remark.strip())}"


def _rounded(seconds: float) -> float:
    """An estimate is not good to the second: to 5 s below a minute, to 10 s below five, else to half a minute."""
    step = 5 if seconds < 60 else 10 if seconds < 300 else 30
    return step * max(1, round(seconds / step))
