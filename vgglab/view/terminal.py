"""The output of a run: a progress bar on a terminal, otherwise occasional lines."""

from __future__ import annotations

import sys
from typing import Any

from vgglab.errors import printable
from vgglab.view.progress import Progress, loss_text

try:
    from tqdm import tqdm
except ImportError:  # may be missing from the vendor's image; lines are printed then
    tqdm = None

BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt} steps{postfix}"


class Terminal:
    """A listener for ``RunWriter`` that prints the events."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.bar: Any = None
        self.top = 5

    def __call__(self, event: dict[str, Any]) -> None:
        self.progress.add(event)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def print_line(self, text: str) -> None:
        """Print a line on stdout, above the progress bar if there is one."""
        if self.bar is not None:
            self.bar.write(printable(text))
        else:
            print(printable(text), flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _on_start(self, event: dict[str, Any]) -> None:
        self.top = min(5, event["num_classes"])
        train_images = f"{event['num_train_images']} training images, " if event["num_train_images"] else ""
        size = f"{event['num_parameters'] / 1e6:.1f} million parameters"
        self.print_line(f"{event['data']}: {train_images}{event['num_eval_images']} held-out images; {size}")
        if event.get("simulated"):
            self.print_line("simulated card: the losses are real, but the times say nothing about a real card")
        if tqdm is not None and sys.stderr.isatty() and self.progress.num_steps > self.progress.step:
            total, initial = self.progress.num_steps, self.progress.step
            self.bar = tqdm(total=total, initial=initial, bar_format=BAR_FORMAT, dynamic_ncols=True)
            self._draw("")

    def _on_train(self, event: dict[str, Any]) -> None:
        speed = "" if event.get("simulated") else f"{event['images_per_second']:.1f} images/s  "
        metrics = f"loss {loss_text(event['loss'])}  {speed}{self.progress.time_left()}"
        if self.bar is None:
            total = f" of {self.progress.num_steps}" if self.progress.num_steps else ""
            self.print_line(f"{self.progress.activity}, step {event['step']}{total}: {metrics}")
        else:
            self._draw(metrics)

    def _on_eval_start(self, event: dict[str, Any]) -> None:
        if self.bar is not None:
            self._draw(self.progress.time_left())

    def _on_eval(self, event: dict[str, Any]) -> None:
        epoch = "" if event["epoch"] is None else f"epoch {event['epoch'] + 1}: "
        self.print_line(
            f"{epoch}top-1 {event['acc1']:.2f} %, top-{self.top} {event['acc5']:.2f} % "
            f"of {event['num_images']} held-out images, loss {loss_text(event['loss'])}"
        )

    def _on_warning(self, event: dict[str, Any]) -> None:
        self.print_line(f"warning: {event['text']}")

    def _on_end(self, event: dict[str, Any]) -> None:
        self.close()

    def _draw(self, metrics: str) -> None:
        self.bar.set_description_str(self.progress.activity, refresh=False)
        self.bar.set_postfix_str(metrics, refresh=False)
        self.bar.n = self.progress.step
        self.bar.refresh()
