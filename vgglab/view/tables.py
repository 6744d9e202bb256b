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


class Table(NamedTuple):
    """Rows of text, displayed as a table in a notebook; a missing value is an empty cell."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    title: str = ""
    note: str = ""
    num_text_columns: int | None = None  # the others are aligned to the right; None: no column is
    bold_rows: Container[int] = ()

    def __repr__(self) -> str:
        return "\n".join(filter(None, [self.title, self._text() if self.rows else "none", self.note]))

    def _text(self) -> str:
        table = [[" ".join((cell or "").split("\n")) for cell in cells] for cells in (self.headings, *self.rows)]
        columns = []
        for number, column in enumerate(zip(*table)):
            width = max(map(len, column))
            if any(column[1:]):
                columns.append([cell.rjust(width) if self._is_right(number) else cell.ljust(width) for cell in column])
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns)]
        return "\n".join(lines if any(self.headings) else lines[1:])

    def _is_right(self, number: int) -> bool:
        return self.num_text_columns is not None and number >= self.num_text_columns

    def _repr_html_(self) -> str:
        title = html_text(self.title, "h2") if self.title else ""
        table = self._html() if self.rows else html_text("none")
        return title + table + (html_text(self.note) if self.note else "")

    def _html(self) -> str:
        """The table as HTML that scrolls sideways if the window is narrow."""
        lines = [self._html_row(self.headings, "th").replace("\n", "<br>")]
        for number, cells in enumerate(self.rows):
            lines.append(self._html_row(cells, "th" if number in self.bold_rows else "td"))
        return f"<div style='overflow-x:auto'><table>{''.join(lines)}</table></div>"

    def _html_row(self, cells: Sequence[str | None], tag: str) -> str:
        html_cells, style = "", ""  # the page or Jupyter decides on the alignment
        for number, cell in enumerate(cells):
            if self.num_text_columns is not None:
                side = "right" if self._is_right(number) else "left"
                style = f"text-align: {side}; padding: 0 0.7em; font-variant-numeric: tabular-nums"
            html_cells += html_text(cell or "", tag, style)
        return f"<tr>{html_cells}</tr>"


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
