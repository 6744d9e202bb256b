"""Executed notebooks as a small web site: one page for each and an index, all usable offline.

nbconvert creates the pages. Its template loads scripts for mathematics, diagrams and widgets from the web; these
notebooks do not need them, so they are removed. Links to the other pages are added.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence
from urllib.parse import quote

from vgglab.errors import UserError
from vgglab.view.progress import duration
from vgglab.view.tables import POLICY, html_text

GENERATOR = '<meta name="generator" content="vgglab.book">'
LINK = re.compile(r'href="([^"/:]+)\.ipynb(#[^"]*)?"')  # from one notebook to another

PAGE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js_requirejs -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_css -%}<!-- generator --><!-- policy --><style><!-- style --></style>{%- endblock -%}
{%- block data_png scoped -%}
{%- set words = output | get_metadata('alt', 'image/png') or 'a picture' -%}
{{ super() | replace('<img ', '<img alt="' ~ words | e ~ '" ', 1) }}
{%- endblock -%}
{%- block body_header -%}{{ super() }}<nav><!-- nav --></nav>{%- endblock -%}
{%- block body_footer -%}<nav><!-- nav --></nav>{{ super() }}{%- endblock -%}
"""

# In a narrow window, the prompts are hidden to make room for the text; wide content scrolls separately.
STYLE = """
body.jp-Notebook{padding:0 1em;overflow-x:hidden}main{max-width:62em;margin:auto}
nav{font:15px/1.6 sans-serif;margin:1em 0}nav a{margin-right:1.2em}
.jp-OutputArea-output{overflow-x:auto}.jp-RenderedImage img{max-width:100%;height:auto}
.jp-RenderedMarkdown pre+p{margin-top:1em}
.jp-RenderedHTMLCommon table{display:block;overflow-x:auto;max-width:100%}
@media(max-width:700px){.jp-InputPrompt,.jp-OutputPrompt{display:none}.jp-Cell{padding:2px 0}
.jp-InputArea-editor,.highlight pre{overflow-x:auto!important}body.jp-Notebook{padding:0 .5em}}
"""

FAILED = "color:#b03a00;white-space:pre-wrap"
INDEX_STYLE = """
body{font:16px/1.5 sans-serif;color:#333;max-width:46em;margin:2em auto;padding:0 1em}
li{margin:.8em 0}small{color:#666}code{background:#f3f3f3;padding:0 .2em}
"""


class Chapter(NamedTuple):
    """An executed notebook, its duration, and the error if it failed."""

    file: Path
    seconds: float
    error: str

    @property
    def page(self) -> str:
        return f"{self.file.stem}.html"

    @property
    def link(self) -> str:
        return quote(self.page)  # leaves no characters that are special in HTML


def check_overwritable(folder: Path, stems: Sequence[str]) -> None:
    """Refuse to overwrite files that this command did not write.

    Raises:
        UserError: a file with the name of a page was not written by this command.
    """
    for page in [folder / f"{stem}.html" for stem in ("index", *stems)]:
        if page.is_symlink() or page.is_dir():
            is_generated = False
        else:
            is_generated = not page.exists() or GENERATOR in page.read_text(encoding="utf-8", errors="replace")
        if not is_generated:
            raise UserError(f"--out {folder}: {page.name} was not written by this command; choose another folder")


def write_site(
    chapters: Sequence[Chapter], folder: Path, parameters: Mapping[str, str], with_code: bool = True
) -> None:
    """Write a page for each executed notebook, and ``index.html`` with summaries, durations and failures."""
    pages = [(chapter, *_title_and_summary(chapter.file)) for chapter in chapters if _is_complete(chapter.file)]
    for index, (chapter, _, _) in enumerate(pages):
        links = [("index.html", "All notebooks · 目录")]
        links += [(pages[i][0].link, arrow + pages[i][1]) for i, arrow in ((index - 1, "← "), (index + 1, "→ "))
                  if 0 <= i < len(pages)]  # fmt: skip
        nav = "".join(f"<a href='{target}'>{html_text(name, 'span')}</a>" for target, name in links)
        (folder / chapter.page).write_text(_page(chapter.file, nav, with_code), encoding="utf-8")
    items = []
    for chapter, title, summary in pages:
        number = re.match(r"\d\d(?=_)", chapter.file.stem)
        numbered = f"{number.group()} {title}" if number else title
        error_html = html_text(f"failed: {chapter.error.strip()}", "div", FAILED) if chapter.error else ""
        items.append(
            f"<li><a href='{chapter.link}'>{html_text(numbered, 'span')}</a> <small>{duration(chapter.seconds)}</small>"
            f"<br>{html_text(summary, 'span')}{error_html}</li>"
        )
    for chapter in chapters:
        if not _is_complete(chapter.file):
            items.append(
                f"<li>{html_text(chapter.file.stem, 'span')}{html_text(f'failed: {chapter.error}', 'div', FAILED)}</li>"
            )
    flags = " ".join(f"-p {name} {value}" for name, value in parameters.items())
    description = f"with {html_text(flags, 'code')}" if flags else "with their default settings"
    (folder / "index.html").write_text(
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>{GENERATOR}{POLICY}"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>vgglab: the notebooks</title>"
        f"<style>{INDEX_STYLE}</style></head><body><h1>vgglab: the notebooks with results</h1><p>Run from top to "
        f"bottom without interaction, {description}.</p><ul>{''.join(items)}</ul></body></html>\n",
        encoding="utf-8",
    )


def _is_complete(file: Path) -> bool:
    """Return whether the executed notebook exists and can be read, even if one of its cells failed."""
    try:
        return "cells" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _title_and_summary(file: Path) -> tuple[str, str]:
    """Return the title of a notebook, and its first sentence without Markdown markup."""
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and text.startswith("# "):
            title, _, rest = text[2:].partition("\n")
            sentence = re.split(r"(?<=[.。])\s", " ".join(rest.split()))[0]
            return title.strip(), re.sub(r"[*`_]|\[([^]]*)\]\([^)]*\)", r"\1", sentence)
    return file.stem, ""


def _page(file: Path, nav: str, with_code: bool) -> str:
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    exporter: Any = HTMLExporter(extra_loaders=[DictLoader({"book.html.j2": PAGE})], template_file="book.html.j2")
    exporter.exclude_input, exporter.embed_images = not with_code, True
    notebook = nbformat.read(str(file), as_version=4)
    notebook.metadata["title"] = _title_and_summary(file)[0]
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(file.parent)}})
    for mark, text in ("generator", GENERATOR), ("policy", POLICY), ("style", STYLE), ("nav", nav):
        body = body.replace(f"<!-- {mark} -->", text)
    return LINK.sub(r'href="\1.html\2"', body)
