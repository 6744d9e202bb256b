"""A button for choosing a photograph in a live notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

from vgglab.errors import UserError
from vgglab.view.figures import NotebookFigure
from vgglab.view.live import front_end
from vgglab.view.tables import html_text


def choose_photograph(look: Callable[[str, bytes], tuple[str, NotebookFigure]], example: str | Path) -> Any:
    """Print the text of ``look(name, data)`` for ``example``; return the button or, without widgets, the picture."""
    line, picture = look(Path(example).name, Path(example).read_bytes())
    print(line)
    return PhotographChooser(look) if front_end() == "live" else picture


class PhotographChooser:
    """A button to choose a file, and below it the result of ``look``; for a live notebook.

    The button can be reached with Tab and pressed with Enter or the space bar. The content of the file is passed only
    to ``look``; if ``look`` raises a UserError, its message is shown instead of a picture.
    """

    def __init__(self, look: Callable[[str, bytes], tuple[str, NotebookFigure]]) -> None:
        """Create the button. ``look(name, data)`` returns a line of text and a picture, or raises UserError."""
        import ipywidgets as widgets

        self.look = look
        self.button = widgets.FileUpload(
            accept="image/*",
            multiple=False,
            description="Your photograph",
            tooltip="A JPEG or PNG file; it is decoded in this kernel and not stored",
            layout=widgets.Layout(width="max-content"),
        )
        self.button.observe(self._on_file, names="value")
        self.line = widgets.HTML()
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", display="none"))
        self.widget = widgets.VBox([self.button, self.line, self.picture])

    def _on_file(self, change: Any) -> None:
        for file in change["new"]:
            self.line.value = html_text(f"Looking at {file['name']} ...", "span")
            try:
                line, picture = self.look(file["name"], bytes(file["content"]))
                self.picture.value, self.picture.layout.display = picture.png(), None
            except UserError as error:
                line, self.picture.layout.display = str(error), "none"
            self.line.value = html_text(line, "span")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget._repr_mimebundle_(**options)
