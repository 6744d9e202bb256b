"""How large a notebook runs: ``quick``, ``small`` or ``full``, shown with the expected time before it starts."""

from __future__ import annotations

import html
from typing import Any

from vgglab.errors import UserError
from vgglab.view.progress import duration
from vgglab.view.tables import html_table, text_table

RUNGS = ("quick", "small", "full")


class Ladder:
    """What each rung sets, by the name of the notebook's parameter.

    >>> ladder = Ladder(model=("vgg11_bn", "vgg16_bn", "vgg16"), epochs=(2, 6, 90), seconds=(60, None, None))
    >>> model, epochs = ladder.choose("small", model=None, epochs=3)  # "vgg16_bn", 3
    """

    def __init__(self, seconds: tuple[float | None, ...], timed_on: str = "", **settings: tuple[Any, ...]) -> None:
        """``seconds`` each rung took on the machine that ``timed_on`` names; None: nobody has timed it."""
        self.settings, self.seconds, self.timed_on = settings, seconds, timed_on

    def choose(self, profile: str, **given: Any) -> list[Any]:
        """A rung's settings, in the order of ``given``, whose own values win unless they are None; shows the table.

        Raises:
            UserError: no rung of that name.
        """
        if profile not in RUNGS:
            raise UserError(f"profile: {profile!r} is not one of {', '.join(RUNGS)}")
        place = RUNGS.index(profile)
        chosen = {name: self.settings[name][place] if own is None else own for name, own in given.items()}
        table = LadderTable(self, place, chosen, {name for name, own in given.items() if own is not None})
        try:
            from IPython.display import display
        except ImportError:
            print(table)
        else:
            display(table)
        return list(chosen.values())


class LadderTable:
    """The rungs side by side, the chosen one marked, what was set by hand in its place, and the expected time."""

    def __init__(self, ladder: Ladder, place: int, chosen: dict[str, Any], by_hand: set[str]) -> None:
        self.headings = ["", *(f"{rung}, chosen" if n == place else rung for n, rung in enumerate(RUNGS))]
        self.rows = []
        for name, values in ladder.settings.items():
            cells = [str(value) for value in values]
            if name in by_hand:
                cells[place] = f"{chosen[name]} (set by hand)"
            self.rows.append([name, *cells])
        times = [duration(seconds) if seconds is not None else "nobody has timed it" for seconds in ladder.seconds]
        self.rows.append(["expected time", *times])
        self.remark = f"Timed on {ladder.timed_on}." if ladder.timed_on else ""
        if by_hand:
            self.remark += " What was set by hand changes the time."

    def __repr__(self) -> str:
        return f"{text_table(self.headings, self.rows)}\n{self.remark}".rstrip()

    def _repr_html_(self) -> str:
        return f"{html_table(self.headings, self.rows)}<p>{html.escape(self.remark)}</p>"
