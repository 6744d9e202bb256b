"""Notebook widgets in JupyterLab and Chromium, used by mouse and by keyboard only."""

import pytest
from browser import CHROMIUM, NO_CHROMIUM, PAGE_TIMEOUT_SECONDS, jupyterlab
from processes import NARROW, NARROW_CODE, all_narrow
from test_launch import MARK, processes_with, wait_until

import vgglab

# All tests share one JupyterLab and one browser, so they must run in the same xdist process.
pytestmark = pytest.mark.xdist_group("browser")

LAUNCH_CELL = """import os, vgglab
os.environ["{mark}"] = "{name}"
os.environ["PYTHONPATH"] = "{slow_steps}:" + os.environ["PYTHONPATH"]
run = vgglab.launch("--data-path digits --model vgg11_bn --epochs 500 --batch-size 2 --workers 0 --device cpu",
                    print_freq=1, output_dir="{name}")"""

# Makes the launched training sleep after each step, which leaves the processor to the page and the kernel; for the same
# reason its network is narrow.
SLOW_STEPS = """import time
import vgglab.pace as pace
original = pace.Clock.end_own_work
pace.Clock.end_own_work = lambda clock: (time.sleep(0.2), original(clock))[1]
"""

# Keeps the kernel busy until a file exists.
BUSY_CELL = """import os, time
while not os.path.exists("{name}.done"): time.sleep(0.1)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    for package in ("playwright", "jupyterlab", "ipywidgets", "sklearn"):
        pytest.importorskip(package)
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    with jupyterlab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def test_browser_tests_share_one_process(request):
    """With pytest 9.2 every xdist process started a JupyterLab and a browser (pytest-xdist, issue 1386)."""
    if request.config.getoption("loadgroup", None) is not True:
        pytest.skip("needs --dist loadgroup")
    assert request.node.nodeid.endswith("@browser")


@pytest.fixture(scope="module")
def slow_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow_steps")
    narrow = f"import os\nos.environ[{NARROW!r}] = {all_narrow()!r}\n"
    (folder / "sitecustomize.py").write_text(narrow + NARROW_CODE + SLOW_STEPS)
    return folder


@pytest.fixture
def launched(lab, slow_steps, request):
    """A notebook whose first cell has launched a run and shows its dashboard; also its name and the run."""
    for attempt in range(3):  # on a busy machine a page that has just opened may miss messages of the kernel
        name = f"{request.node.name[:40]}-{attempt}"
        cells = [
            LAUNCH_CELL.format(mark=MARK, name=name, slow_steps=slow_steps),
            BUSY_CELL.format(name=name),
            "vgglab.Run(run.path).watch()",
        ]
        notebook = lab.open(name, cells)
        try:
            notebook.run(0)
            wait_for_text(notebook, 0, " · step ")
            (path,) = (lab.notebooks / name / "runs").iterdir()
            yield notebook, name, vgglab.Run(path)
            return
        except TimeoutError:
            if attempt == 2:
                raise
        finally:
            notebook.close()
            for run_dir in (lab.notebooks / name / "runs").glob("*"):
                vgglab.Run(run_dir).stop()


def wait_for_text(notebook, number, text):
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    try:
        notebook.output(number).filter(has_text=text).first.wait_for(timeout=1000 * PAGE_TIMEOUT_SECONDS)
    except PlaywrightTimeout as error:
        raise TimeoutError(str(error)) from error


def displayed_step(notebook, number=0):
    return int(notebook.output(number).first.inner_text().partition(" · step ")[2].split()[0])


def wait_for_step_after(notebook, step, number=0):
    wait_until(lambda: notebook.page.wait_for_timeout(100) or displayed_step(notebook, number) > step)


def num_dom_nodes(notebook):
    return notebook.page.evaluate("document.querySelectorAll('.jp-Notebook *').length")


def test_dashboard_updates_while_another_cell_runs_and_in_a_second_cell(lab, launched):
    notebook, name, _ = launched
    notebook.output(0).locator("img").wait_for()
    notebook.run(1)
    wait_for_step_after(notebook, displayed_step(notebook))
    wait_for_step_after(notebook, displayed_step(notebook))
    assert notebook.prompt(1) == "[*]:"  # updated twice while the kernel was busy
    (lab.notebooks / f"{name}.done").touch()
    wait_until(lambda: notebook.page.wait_for_timeout(100) or notebook.prompt(1) != "[*]:")
    before = num_dom_nodes(notebook)
    for _ in range(6):
        wait_for_step_after(notebook, displayed_step(notebook))
    assert num_dom_nodes(notebook) <= before + 5
    assert notebook.output(0).count() == 1
    notebook.run(2)
    wait_for_text(notebook, 2, " · step ")
    wait_for_step_after(notebook, displayed_step(notebook, 2), 2)


def test_stop_button_interrupts_the_run_and_shows_its_status(launched):
    notebook, name, run = launched
    assert processes_with(name)
    notebook.output(0).get_by_role("button", name="Stop").click()
    wait_for_text(notebook, 0, ": interrupted")
    wait_until(lambda: not processes_with(name))
    assert run.status == "interrupted"
    notebook.output(0).get_by_role("button", name="Ended").wait_for()


def test_dashboard_survives_a_reload_and_stops_by_keyboard(launched):
    notebook, name, run = launched
    notebook.save()
    step = displayed_step(notebook)
    notebook.reload()
    wait_for_text(notebook, 0, " · step ")
    wait_for_step_after(notebook, step)
    notebook.cell(0).locator(".cm-content").click()
    notebook.page.keyboard.press("Escape")
    for _ in range(20):
        notebook.page.keyboard.press("Tab")
        if notebook.page.evaluate("document.activeElement.innerText.trim()") == "Stop":
            break
    notebook.page.keyboard.press("Space")
    wait_for_text(notebook, 0, ": interrupted")
    wait_until(lambda: not processes_with(name))
    assert run.status == "interrupted"


EXPLORER_CELL = """import numpy, vgglab.anatomy
from vgglab.view.explorer import explore
explore(vgglab.anatomy.of, numpy.zeros((64, 64, 3), "uint8"))"""


def test_explorer_controls_change_the_figure_by_keyboard(lab):
    notebook = lab.open("explorer", [EXPLORER_CELL])
    notebook.run(0)
    output, picture = notebook.output(0), notebook.output(0).locator("img")
    picture.wait_for()
    controls = [
        (output.get_by_role("slider"), ["ArrowLeft"], "192 pixels"),
        # JupyterLab handles the arrow keys itself until the list is open.
        (output.get_by_role("combobox").nth(0), ["Space", "ArrowUp", "Enter"], "vgg13"),
        (output.get_by_role("checkbox"), ["Space"], "vgg13_bn"),
        (output.get_by_role("combobox").nth(1), ["Space", "ArrowDown", "Enter"], "batch norm"),
    ]
    for control, keys, text in controls:
        before = picture.get_attribute("src")
        control.focus()
        for key in keys:
            notebook.page.keyboard.press(key)
        output.locator("table").filter(has_text=text).wait_for()
        wait_until(lambda before=before: notebook.page.wait_for_timeout(100) or picture.get_attribute("src") != before)
    notebook.close()


CHOOSER_CELL = """from vgglab.lab import features
from vgglab.view.figures import NotebookFigure
from vgglab.view.photograph_chooser import photograph_button

def look(name, data):
    pixels = features.read_photograph(name, data)
    figure = NotebookFigure(2, 2)
    figure.subplots().imshow(pixels)
    return f"{name}: {pixels.shape[1]} x {pixels.shape[0]} pixels", figure

photograph_button(look)"""


def open_file_chooser(notebook, button):
    """Press Enter until the chooser opens; a page that has just opened may ignore the first key."""
    opened = []
    notebook.page.once("filechooser", lambda chooser: opened.append(chooser))  # Playwright accepts only functions

    def is_open():
        if not opened:
            button.focus()
            notebook.page.keyboard.press("Enter")
            notebook.page.wait_for_timeout(1000)
        return opened

    wait_until(is_open)
    return opened[0]


def test_own_photograph_can_be_chosen_by_keyboard(lab, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "mine.png")
    (tmp_path / "notes.txt").write_text("no image")
    notebook = lab.open("chooser", [CHOOSER_CELL])
    notebook.run(0)
    button = notebook.output(0).get_by_role("button", name="Your photograph")
    for file, text in ("mine.png", "mine.png: 60 x 40 pixels"), ("notes.txt", "'notes.txt' cannot be read"):
        open_file_chooser(notebook, button).set_files(tmp_path / file)
        wait_for_text(notebook, 0, text)
        has_picture = file == "mine.png"
        notebook.output(0).locator("img").wait_for(state="visible" if has_picture else "hidden")
    assert notebook.output(0).get_by_text("Looking at").count() == 0  # the error message has replaced it
    notebook.close()
