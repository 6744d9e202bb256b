"""Regenerate the README's picture with JupyterLab: ``python tests/pictures.py``."""

import tempfile
from pathlib import Path

from browser import jupyterlab
from conftest import PROJECT

LAUNCH_CELL = """import vgglab
run = vgglab.launch("--data-path digits --model vgg11_bn --epochs 6 --warmup 1 --lr 0.1 --lr-schedule cosine",
                    device="cpu", run_dir="runs/first")"""


def capture_dashboard(lab) -> None:
    """The dashboard in the middle of a run, after three evaluated epochs."""
    notebook = lab.open("dashboard", [LAUNCH_CELL, "run.stop()"], viewport={"width": 1290, "height": 900})
    notebook.run(0)
    output = notebook.output(0)
    output.filter(has_text="epoch 4 of").first.wait_for(timeout=300_000)
    notebook.page.mouse.move(0, 0)
    notebook.page.wait_for_timeout(2500)  # the figure is updated after the text
    output.first.screenshot(path=PROJECT / "docs" / "dashboard.png")
    notebook.run(1)
    notebook.close()


if __name__ == "__main__":
    (PROJECT / "docs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as lab:
        capture_dashboard(lab)
