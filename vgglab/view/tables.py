"""Tables of plain cells, as text and as HTML; a column that is empty throughout is left out of the text."""

from __future__ import annotations

import html
from typing import Sequence


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    table = [headings, *rows]
    columns = [c for c in range(len(headings)) if any(cells[c] for cells in rows)]
    widths = {c: max(len(cells[c]) for cells in table) for c in columns}
    return "\n".join("  ".join(cells[c].ljust(widths[c]) for c in columns).rstrip() for cells in table)


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One that scrolls where the window is narrow."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    return f"<div style='overflow-x:auto'><table><tr>{head}</tr>{body}</table></div>"


def html_facts(rows: Sequence[Sequence[str]]) -> str:
    """Names on the left, what they are on the right."""
    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{html.escape(value)}"
        "</td></tr>"
        for name, value in rows
    )
    return f"<div style='overflow-x:auto'><table>{body}</table></div>"


def html_lines(lines: Sequence[str]) -> str:
    """Lines of plain text, one below the other."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
