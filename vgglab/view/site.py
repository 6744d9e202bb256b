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
HEAD = GENERATOR + POLICY
LINK = re.compile(r'href="([^"/:]+)\.ipynb(#[^"]*)?"')  # from one notebook to another

# In a narrow window, the prompts are hidden to make room for the text; wide content scrolls separately.
PAGE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js_requirejs -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_css -%}<!-- head --><style>
body.jp-Notebook{padding:0 1em;overflow-x:hidden}main{max-width:62em;margin:auto}
nav{font:15px/1.6 sans-serif;margin:1em 0}nav a{margin-right:1.2em}
.jp-OutputArea-output{overflow-x:auto}.jp-RenderedImage img{max-width:100%;height:auto}
.jp-RenderedMarkdown pre+p{margin-top:1em}
.jp-RenderedHTMLCommon table{display:block;overflow-x:auto;max-width:100%}
@media(max-width:700px){.jp-InputPrompt,.jp-OutputPrompt{display:none}.jp-Cell{padding:2px 0}
.jp-InputArea-editor,.highlight pre{overflow-x:auto!important}body.jp-Notebook{padding:0 .5em}}
</style>{%- endblock -%}
{%- block data_png scoped -%}
{%- set words = output | get_metadata('alt', 'image/png') or 'a picture' -%}
{{ super() | replace('<img ', '<img alt="' ~ words | e ~ '" ', 1) }}
{%- endblock -%}
{%- block body_header -%}{{ super() }}{{ resources.nav }}{%- endblock -%}
{%- block body_footer -%}{{ resources.nav }}{{ super() }}{%- endblock -%}
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
    def link(self) -> str:
        return quote(f"{self.file.stem}.html")  # leaves no characters that are special in HTML


def check_overwritable(folder: Path, stems: Sequence[str]) -> None:
    """Refuse to overwrite files that this command did not write.

    Raises:
        UserError: a file with the name of a page was not written by this command.
    """
    for page in [folder / f"{stem}.html" for stem in ("index", *stems)]:
        is_no_file = page.is_symlink() or page.is_dir()
        if is_no_file or (page.exists() and GENERATOR not in page.read_text(encoding="utf-8", errors="replace")):
            raise UserError(f"--out {folder}: {page.name} was not written by this command; choose another folder")


def write_site(
    chapters: Sequence[Chapter], folder: Path, parameters: Mapping[str, str], with_code: bool = True
) -> None:
    """Write a page for each executed notebook, and ``index.html`` with summaries, durations and failures."""
    pages = [(chapter, *_title_and_summary(chapter.file)) for chapter in chapters]
    pages.sort(key=lambda page: page[1] == "")  # those that cannot be shown are listed last
    complete = [(chapter, title) for chapter, title, _ in pages if title]
    for index, (chapter, title) in enumerate(complete):
        links = [("index.html", "All notebooks · 目录")]
        links += [(complete[i][0].link, arrow + complete[i][1]) for i, arrow in ((index - 1, "← "), (index + 1, "→ "))
                  if 0 <= i < len(complete)]  # fmt: skip
        nav = "".join(f"<a href='{target}'>{html_text(name, 'span')}</a>" for target, name in links)
        page = _page(chapter.file, title, f"<nav>{nav}</nav>", with_code)
        (folder / f"{chapter.file.stem}.html").write_text(page, encoding="utf-8")
    items = ""
    for chapter, title, summary in pages:
        item = html_text(chapter.file.stem, "span")
        if title:
            number = re.match(r"\d\d(?=_)", chapter.file.stem)
            link = html_text(f"{number.group()} {title}" if number else title, "span")
            time_and_summary = f"<small>{duration(chapter.seconds)}</small><br>{html_text(summary, 'span')}"
            item = f"<a href='{chapter.link}'>{link}</a> {time_and_summary}"
        error = chapter.error.strip() or ("" if title else "this notebook cannot be read")
        error = html_text(f"failed: {error}", "div", FAILED) if error else ""
        items += f"<li>{item}{error}</li>"
    flags = " ".join(f"-p {name} {value}" for name, value in parameters.items())
    description = f"with {html_text(flags, 'code')}" if flags else "with their default settings"
    (folder / "index.html").write_text(
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>{HEAD}"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>vgglab: the notebooks</title>"
        f"<style>{INDEX_STYLE}</style></head><body><h1>vgglab: the notebooks with results</h1><p>Run from top to "
        f"bottom without interaction, {description}.</p><ul>{items}</ul></body></html>\n",
        encoding="utf-8",
    )


def _title_and_summary(file: Path) -> tuple[str, str]:
    """Return the title of an executed notebook, and its first sentence without Markdown markup.

    Both are empty if the file does not exist or cannot be read; they are returned even if a cell failed.
    """
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and text.startswith("# "):
            title, _, rest = text[2:].partition("\n")
            sentence = re.split(r"(?<=[.。])\s", " ".join(rest.split()))[0]
            return title.strip() or file.stem, re.sub(r"[*`_]|\[([^]]*)\]\([^)]*\)", r"\1", sentence)
    return file.stem, ""


def _page(file: Path, title: str, nav: str, with_code: bool) -> str:
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    exporter: Any = HTMLExporter(extra_loaders=[DictLoader({"book.html.j2": PAGE})], template_file="book.html.j2")
    exporter.exclude_input, exporter.embed_images = not with_code, True
    notebook = nbformat.read(str(file), as_version=4)
    notebook.metadata["title"] = title
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(file.parent)}, "nav": nav})
    body = body.replace("<!-- head -->", HEAD, 1)  # the exporter would write these elements in another way
    return LINK.sub(r'href="\1.html\2"', body)
