"""A button for choosing a photograph in a live notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

from vgglab.errors import UserError
from vgglab.view.figures import NotebookFigure
from vgglab.view.live import front_end
from vgglab.view.tables import html_text


def choose_photograph(look: Callable[[str, bytes], tuple[str, NotebookFigure]], example: str | Path) -> Any:
    """Print the text that ``look`` returns for ``example``; return the figure or, with widgets, an upload button."""
    line, picture = look(Path(example).name, Path(example).read_bytes())
    print(line)
    return photograph_button(look) if front_end() == "live" else picture


def photograph_button(look: Callable[[str, bytes], tuple[str, NotebookFigure]]) -> Any:
    """Return a button to choose a file, and below it the result of ``look``; for a live notebook.

    The button can be reached with Tab and pressed with Enter or the space bar. The content of the file is passed only
    to ``look``; if ``look`` raises a UserError, its message is shown instead of a picture.
    """
    import ipywidgets as widgets

    button = widgets.FileUpload(
        accept="image/*",
        multiple=False,
        description="Your photograph",
        tooltip="A JPEG or PNG file; it is decoded in this kernel and not stored",
        layout=widgets.Layout(width="max-content"),
    )
    line = widgets.HTML()
    picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", display="none"))

    def show(change: Any) -> None:
        for file in change["new"]:
            line.value = html_text(f"Looking at {file['name']} ...", "span")
            try:
                text, figure = look(file["name"], bytes(file["content"]))
                picture.value, picture.layout.display = figure.png(), None
            except UserError as error:
                text, picture.layout.display = str(error), "none"
            line.value = html_text(text, "span")

    button.observe(show, names="value")
    return widgets.VBox([button, line, picture])
