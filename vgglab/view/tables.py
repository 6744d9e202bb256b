"""Tables and paragraphs as text and as HTML. All text from a run is escaped here when it is converted to HTML.

Columns without content are omitted from text tables.
"""

from __future__ import annotations

import html
from typing import Any, Container, NamedTuple, Sequence

# For complete pages: scripts are blocked, and nothing is fetched.
POLICY = (
    "<meta http-equiv='Content-Security-Policy' "
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:\">"
)
# Of a cell, by its side; without a preference, the page or Jupyter decides.
STYLES = {
    "": "",
    "<": "text-align: left; padding: 0 0.7em",
    ">": "text-align: right; padding: 0 0.7em; font-variant-numeric: tabular-nums",
}


class Table(NamedTuple):
    """Rows of text, displayed as a table in a notebook; a missing value is an empty cell."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    title: str = ""
    note: str = ""
    sides: Sequence[str] = ""  # of each column, "<" if aligned to the left and ">" to the right; empty: no preference
    bold_rows: Container[int] = ()

    def __repr__(self) -> str:
        return "\n".join(filter(None, [self.title, self._text() if self.rows else "none", self.note]))

    def _text(self) -> str:
        table = [[" ".join((cell or "").split("\n")) for cell in cells] for cells in (self.headings, *self.rows)]
        columns = []
        for number, side in enumerate(self.sides or "<" * len(self.headings)):
            column = [cells[number] for cells in table]
            if any(column[1:]):
                width = max(map(len, column))
                columns.append([f"{cell:{side}{width}}" for cell in column])
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns)]
        return "\n".join(lines if any(self.headings) else lines[1:])

    def _repr_html_(self) -> str:
        title = html_text(self.title, "h2") if self.title else ""
        table = self._html() if self.rows else html_text("none")
        return title + table + (html_text(self.note) if self.note else "")

    def _html(self) -> str:
        """The table as HTML that scrolls sideways if the window is narrow."""
        lines = self._html_row(self.headings, "th").replace("\n", "<br>")
        for number, cells in enumerate(self.rows):
            lines += self._html_row(cells, "th" if number in self.bold_rows else "td")
        return f"<div style='overflow-x:auto'><table>{lines}</table></div>"

    def _html_row(self, cells: Sequence[str | None], tag: str) -> str:
        sides = self.sides or [""] * len(cells)
        html_cells = [html_text(cell or "", tag, STYLES[side]) for side, cell in zip(sides, cells)]
        return f"<tr>{''.join(html_cells)}</tr>"


def html_facts(rows: Sequence[Sequence[str]]) -> str:
    """Return a two-column HTML table: names and values."""
    style = "text-align:left"
    body = "".join(f"<tr>{html_text(name, 'th', style)}{html_text(value, 'td', style)}</tr>" for name, value in rows)
    return f"<div style='overflow-x:auto'><table>{body}</table></div>"


def html_text(text: str, tag: str = "p", style: str = "") -> str:
    """Return an HTML element that contains ``text``, escaped."""
    attribute = f" style='{style}'" if style else ""
    return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"


def show(table: Any) -> None:
    """Show a table, or an object that is displayed as one, as HTML in a notebook, otherwise as text."""
    try:
        from IPython.display import display
    except ImportError:
        print(table)
    else:
        display(table)
