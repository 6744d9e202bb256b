"""Tables and paragraphs as text and as HTML. All text from a run is escaped here when it is converted to HTML.

Columns without content are omitted from text tables.
"""

from __future__ import annotations

import html
from typing import Any, NamedTuple, Sequence

# For complete pages: scripts are blocked, and nothing is fetched.
POLICY = (
    "<meta http-equiv='Content-Security-Policy' "
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:\">"
)


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """Return a table as text, with aligned columns; a missing value is an empty cell."""
    table = [[" ".join((cell or "").split("\n")) for cell in cells] for cells in (headings, *rows)]
    columns = [c for c in range(len(headings)) if any(cells[c] for cells in table[1:])]
    widths = {c: max(len(cells[c]) for cells in table) for c in columns}
    return "\n".join("  ".join(cells[c].ljust(widths[c]) for c in columns).rstrip() for cells in table)


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """Return a table as HTML that scrolls sideways if the window is narrow."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell or '')}</td>" for cell in cells) + "</tr>" for cells in rows
    )
    return f"<div style='overflow-x:auto'><table><tr>{head}</tr>{body}</table></div>"


class Table(NamedTuple):
    """Rows of text, displayed as a table in a notebook."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    title: str = ""
    note: str = ""

    def __repr__(self) -> str:
        table = text_table(self.headings, self.rows) if self.rows else "none"
        return "\n".join(filter(None, [self.title, table, self.note]))

    def _repr_html_(self) -> str:
        table = html_table(self.headings, self.rows) if self.rows else html_text("none")
        title = html_text(self.title, "h2") if self.title else ""
        return title + table + (html_text(self.note) if self.note else "")


def html_facts(rows: Sequence[Sequence[str]]) -> str:
    """Return a two-column HTML table: names and values."""
    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{html.escape(value)}"
        "</td></tr>"
        for name, value in rows
    )
    return f"<div style='overflow-x:auto'><table>{body}</table></div>"


def html_text(text: str, tag: str = "p", style: str = "") -> str:
    """Return an HTML element that contains ``text``, escaped."""
    return f"<{tag} style='{style}'>{html.escape(text)}</{tag}>" if style else f"<{tag}>{html.escape(text)}</{tag}>"


def show(table: Any) -> None:
    """Show a table as HTML in a notebook, otherwise as text."""
    try:
        from IPython.display import display
    except ImportError:
        print(table)
    else:
        display(table)
