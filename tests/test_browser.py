"""The dashboard as people see it: in JupyterLab, in Chromium, with a mouse and with the keyboard alone."""

import pytest
from browser import CHROMIUM, NO_CHROMIUM, SECONDS, jupyterlab
from test_launch import MARK, processes_with, wait_until

import vgglab

# One JupyterLab and one browser for all, so all in one of the suite's processes.
pytestmark = pytest.mark.xdist_group("browser")

LAUNCH = """import os, vgglab
os.environ["{mark}"] = "{name}"
os.environ["PYTHONPATH"] = "{slow_steps}:" + os.environ["PYTHONPATH"]
run = vgglab.launch("--data-path digits --model vgg11_bn --epochs 500 --batch-size 16 --workers 0 --device cpu",
                    print_freq=1, output_dir="{name}")"""

# The launched training sleeps after each step and leaves the processor to the page and the kernel.
SLOW_STEPS = """import time
import vgglab.pace as pace
original = pace.Clock.end_own_work
pace.Clock.end_own_work = lambda clock: (time.sleep(0.2), original(clock))[1]
"""

# Keeps the kernel busy until a file is there.
BLOCK = """import os, time
while not os.path.exists("{name}.done"): time.sleep(0.1)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    for package in ("playwright", "jupyterlab", "ipywidgets", "sklearn"):
        pytest.importorskip(package)
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    with jupyterlab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def test_the_tests_of_this_group_share_a_process(request):
    """With pytest 9.2 each of the suite's processes started a JupyterLab and a browser (pytest-xdist, issue 1386)."""
    if request.config.getoption("loadgroup", None) is not True:
        pytest.skip("needs --dist loadgroup")
    assert request.node.nodeid.endswith("@browser")


@pytest.fixture(scope="module")
def slow_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow_steps")
    (folder / "sitecustomize.py").write_text(SLOW_STEPS)
    return folder


@pytest.fixture
def training(lab, slow_steps, request):
    """A notebook whose first cell has launched a training, its dashboard showing steps; and the run."""
    for attempt in range(3):  # a page that opens while other tests have the machine may miss what the kernel says
        name = f"{request.node.name[:40]}-{attempt}"
        cells = [
            LAUNCH.format(mark=MARK, name=name, slow_steps=slow_steps),
            BLOCK.format(name=name),
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
            for left in (lab.notebooks / name / "runs").glob("*"):
                vgglab.Run(left).stop()


def wait_for_text(notebook, number, text):
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    try:
        notebook.output(number).filter(has_text=text).first.wait_for(timeout=1000 * SECONDS)
    except PlaywrightTimeout as error:
        raise TimeoutError(str(error)) from error


def step_shown(notebook, number=0):
    return int(notebook.output(number).first.inner_text().partition(" · step ")[2].split()[0])


def wait_for_a_step_after(notebook, step, number=0):
    wait_until(lambda: notebook.page.wait_for_timeout(100) or step_shown(notebook, number) > step)


def num_nodes(notebook):
    return notebook.page.evaluate("document.querySelectorAll('.jp-Notebook *').length")


def test_it_moves_while_another_cell_runs_and_a_fresh_cell_shows_it_too(lab, training):
    notebook, name, _ = training
    notebook.output(0).locator("img").wait_for()
    notebook.run(1)
    wait_for_a_step_after(notebook, step_shown(notebook))
    wait_for_a_step_after(notebook, step_shown(notebook))
    assert notebook.prompt(1) == "[*]:"  # it moved twice while the kernel was busy
    (lab.notebooks / f"{name}.done").touch()
    wait_until(lambda: notebook.page.wait_for_timeout(100) or notebook.prompt(1) != "[*]:")
    before = num_nodes(notebook)
    for _ in range(6):
        wait_for_a_step_after(notebook, step_shown(notebook))
    assert num_nodes(notebook) <= before + 5
    assert notebook.output(0).count() == 1
    notebook.run(2)
    wait_for_text(notebook, 2, " · step ")
    wait_for_a_step_after(notebook, step_shown(notebook, 2), 2)


def test_a_click_on_stop_ends_the_run_and_says_so(training):
    notebook, name, run = training
    assert processes_with(name)
    notebook.output(0).get_by_role("button", name="Stop").click()
    wait_for_text(notebook, 0, ": interrupted")
    wait_until(lambda: not processes_with(name))
    assert run.status == "interrupted"
    notebook.output(0).get_by_role("button", name="Ended").wait_for()


def test_it_comes_back_after_a_reload_and_stops_by_keyboard_alone(training):
    notebook, name, run = training
    notebook.save()
    step = step_shown(notebook)
    notebook.reload()
    wait_for_text(notebook, 0, " · step ")
    wait_for_a_step_after(notebook, step)
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


EXPLORE = """import numpy, vgglab.anatomy
from vgglab.view.explorer import explore
explore(vgglab.anatomy.of, numpy.zeros((64, 64, 3), "uint8"))"""


def test_each_control_of_the_explorer_changes_its_figure_by_keyboard_alone(lab):
    notebook = lab.open("explorer", [EXPLORE])
    notebook.run(0)
    output, picture = notebook.output(0), notebook.output(0).locator("img")
    picture.wait_for()
    controls = [
        (output.get_by_role("slider"), ["ArrowLeft"], "192 pixels"),
        # JupyterLab takes the arrows for itself until the list is open.
        (output.get_by_role("combobox").nth(0), ["Space", "ArrowUp", "Enter"], "vgg13"),
        (output.get_by_role("checkbox"), ["Space"], "vgg13_bn"),
        (output.get_by_role("combobox").nth(1), ["Space", "ArrowDown", "Enter"], "batch norm"),
    ]
    for control, keys, told in controls:
        before = picture.get_attribute("src")
        control.focus()
        for key in keys:
            notebook.page.keyboard.press(key)
        output.locator("table").filter(has_text=told).wait_for()
        wait_until(lambda before=before: notebook.page.wait_for_timeout(100) or picture.get_attribute("src") != before)
    notebook.close()


CHOOSE = """from vgglab.lab import features
from vgglab.view.figures import NotebookFigure
from vgglab.view.photograph_chooser import PhotographChooser

def look(name, data):
    pixels = features.read_photograph(name, data)
    figure = NotebookFigure(2, 2)
    figure.subplots().imshow(pixels)
    return f"{name}: {pixels.shape[1]} x {pixels.shape[0]} pixels", figure

PhotographChooser(look)"""


def chooser_opened_by_enter(notebook, button):
    """Enter again while nothing opens: a page that has just opened takes no notice of the first."""
    opened = []
    notebook.page.once("filechooser", lambda chooser: opened.append(chooser))  # Playwright takes functions only

    def is_open():
        if not opened:
            button.focus()
            notebook.page.keyboard.press("Enter")
            notebook.page.wait_for_timeout(1000)
        return opened

    wait_until(is_open)
    return opened[0]


def test_a_photograph_of_the_readers_own_is_chosen_by_keyboard_alone(lab, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "mine.png")
    (tmp_path / "notes.txt").write_text("no image")
    notebook = lab.open("chooser", [CHOOSE])
    notebook.run(0)
    button = notebook.output(0).get_by_role("button", name="Your photograph")
    for file, told in ("mine.png", "mine.png: 60 x 40 pixels"), ("notes.txt", "notes.txt"):
        chooser_opened_by_enter(notebook, button).set_files(tmp_path / file)
        wait_for_text(notebook, 0, told)
        has_picture = file == "mine.png"
        notebook.output(0).locator("img").wait_for(state="visible" if has_picture else "hidden")
    assert notebook.output(0).get_by_text("Looking at").count() == 0  # it has said why, and waits for nothing
    notebook.close()
