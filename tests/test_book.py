"""Notebooks without a hand on the keyboard: executed, checked, and made into pages."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, NO_CHROMIUM, chromium, done_by
from conftest import MAX_WAIT_SECONDS, PROJECT, TINY, wait_until
from processes import python

from vgglab import Run

pytest.importorskip("papermill")


def notebook(file, *cells, title="A title · 标题", alone=False):
    """Markdown where a cell begins with #, else code; the first code cell has the parameters."""
    made, is_first = [], True
    for number, source in enumerate([f"# {title}\n\nAt the end you know it. More of it.", *cells]):
        cell = {"id": f"cell-{number}", "metadata": {}, "source": source}
        if source.startswith("#"):
            made.append({**cell, "cell_type": "markdown"})
        else:
            cell["metadata"] = {"tags": ["parameters"]} if is_first else {}
            made.append({**cell, "cell_type": "code", "outputs": [], "execution_count": None})
            is_first = False
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "vgglab": {"alone": alone}}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return file


@pytest.fixture
def book(tmp_path, monkeypatch, capfd):
    """``book("-p", "x", 1)`` here, in a folder whose notebooks are in ``notebooks/``."""
    from vgglab.commands import call

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))

    def run(*words):
        capfd.readouterr()
        code = call("book", [str(word) for word in words])
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def text_of(executed):
    outputs = [o for cell in json.loads(executed.read_text())["cells"] for o in cell.get("outputs", ())]
    return "".join("".join(output.get("text", ())) for output in outputs)


def test_parameters_reach_the_notebooks_that_have_them_and_the_site_links_them(book, tmp_path):
    notebook(
        tmp_path / "notebooks/00_one.ipynb", "profile = 'quick'", "print('one is', profile)", "# [on](01_two.ipynb)"
    )
    notebook(tmp_path / "notebooks/01_two.ipynb", "device = 'auto'", "print('two on', device)", alone=True)
    result = book("-p", "profile", "full", "-p", "device", "cpu")
    assert result.returncode == 0, result.stderr
    site = tmp_path / "build/notebooks"
    assert text_of(site / "00_one.ipynb") == "one is full\n"
    assert text_of(site / "01_two.ipynb") == "two on cpu\n"
    page = (site / "00_one.html").read_text()
    assert "one is full" in page
    assert 'href="01_two.html"' in page
    index = (site / "index.html").read_text()
    assert "A title · 标题" in index
    assert "At the end you know it." in index
    assert "-p profile full" in index
    for file in site.glob("*.html"):
        # Nothing is fetched: neither scripts nor styles nor pictures have an address elsewhere.
        assert not re.findall(
            r"<script[^>]+src|<link[^>]+href|<img[^>]+src=.https?:|url\(.?https?:|import .*https?:", file.read_text()
        )


def test_a_parameter_that_no_notebook_has_is_refused_before_anything_runs(book, tmp_path):
    notebook(tmp_path / "notebooks/00_one.ipynb", "steps = 1", "open('ran', 'w')")
    result = book("-p", "step", "5")
    assert result.returncode == 2
    assert result.stderr == "vgglab.book: error: -p step: no such parameter; choose from steps\n"
    assert not (tmp_path / "ran").exists()


def test_a_text_that_looks_like_a_number_stays_text(book, tmp_path):
    notebook(tmp_path / "notebooks/00_one.ipynb", "folder = 'runs'\ncount = 1", "print(repr(folder), repr(count))")
    assert book("-p", "folder", "007", "-p", "count", "7").returncode == 0
    assert text_of(tmp_path / "build/notebooks/00_one.ipynb") == "'007' 7\n"


def test_a_path_given_as_a_parameter_begins_where_one_stands(book, tmp_path):
    (tmp_path / "here.txt").write_text("found")
    notebook(tmp_path / "notebooks/00_one.ipynb", "path = ''", "print(open(path).read())")
    assert book("-p", "path", "here.txt").returncode == 0
    assert text_of(tmp_path / "build/notebooks/00_one.ipynb") == "found\n"


def test_a_notebook_that_fails_says_which_cell_and_why_and_the_others_go_on(book, tmp_path):
    notebook(tmp_path / "notebooks/00_bad.ipynb", "x = 0", "print('before')", "# Divide", "1 / x", "print('after')")
    notebook(tmp_path / "notebooks/01_good.ipynb", "x = 0", "print('good')")
    result = book()
    assert result.returncode == 1
    assert "cell 5 of 6, In [3], which begins: 1 / x\n  ZeroDivisionError: division by zero" in result.stderr
    site = tmp_path / "build/notebooks"
    assert text_of(site / "01_good.ipynb") == "good\n"
    assert "ZeroDivisionError" in (site / "index.html").read_text()
    assert "before" in (site / "00_bad.html").read_text()
    last = result.stdout.splitlines()[-1]
    assert last.startswith("1 of 2 notebooks failed after ")
    assert last.endswith("-m vgglab.book notebooks/00_bad.ipynb --out build/notebooks-again")


@pytest.mark.parametrize("name", ["00_one.ipynb", "00_one.html", "index.html"])
def test_what_lies_in_the_folder_and_is_somebodys_own_stays(book, tmp_path, name):
    source = notebook(tmp_path / "notebooks/00_one.ipynb", "x = 0")
    own = tmp_path / "mine" / name
    own.parent.mkdir()
    own.write_text(source.read_text() if name.endswith("ipynb") else "<p>my page</p>")
    before = own.read_text()
    result = book("--out", "mine")
    assert (result.returncode, own.read_text()) == (2, before)
    assert result.stderr.startswith("vgglab.book: error: --out mine: ")
    assert book("--out", "notebooks").returncode == 2  # where the sources lie


def test_a_page_without_the_code_keeps_prose_and_results(book, tmp_path):
    file = notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1", "# A heading", "print('x', 'is', x)")
    assert book(file, "--no-code").returncode == 0
    page = (tmp_path / "build/notebooks/00_one.html").read_text()
    assert "A heading" in page
    assert "x is 1" in page
    assert "print" not in page.split("<body")[1]


DRAW = """from vgglab.view.figures import new_figure
figure, (panel,) = new_figure(1)
panel.plot([1, 2], label="of \\"a\\" & b")
panel.set(title="<A title>", xlabel="step", ylabel="loss")
figure"""


def test_a_page_tells_its_pictures_in_words_too(book, tmp_path):
    assert book(notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1", DRAW)).returncode == 0
    page = (tmp_path / "build/notebooks/00_one.html").read_text()
    ((_, told),) = re.findall(r"""<img alt=(["'])(.*?)\1""", page)
    assert html.unescape(told) == '<A title>: loss over step (of "a" & b)'


def test_a_notebook_of_ones_own_that_speaks_of_papermill_is_not_written_over(book, tmp_path):
    source = notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1")
    own = notebook(tmp_path / "mine/00_one.ipynb", "x = 1", "# By papermill: -p x 2")
    before = own.read_text()
    assert book(source, "--out", "mine").returncode == 2
    assert own.read_text() == before


def test_an_executed_notebook_as_the_source_is_not_written_over(book, tmp_path):
    source = notebook(tmp_path / "made/one.ipynb", "x = 1")
    content = json.loads(source.read_text())
    content["metadata"]["papermill"] = {}
    source.write_text(json.dumps(content))
    before = source.read_text()
    assert book(source, "--out", "made").returncode == 2
    assert source.read_text() == before


def test_what_cannot_be_a_page_of_its_own_is_refused(book, tmp_path):
    one, other = notebook(tmp_path / "a/same.ipynb", "x = 1"), notebook(tmp_path / "b/same.ipynb", "x = 1")
    assert "another page is also named same.html" in book(one, other).stderr
    assert book(notebook(tmp_path / "a/index.ipynb", "x = 1")).returncode == 2
    (tmp_path / "file").write_text("mine")
    assert "--out file: " in book(one, "--out", "file").stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_half_written_notebook_of_before_is_made_anew(book, tmp_path):
    notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1", "print('whole')")
    half = tmp_path / "build/notebooks/00_one.ipynb"
    half.parent.mkdir(parents=True)
    half.write_text('{"metadata": {"papermill": {"start')
    assert book().returncode == 0
    assert text_of(half) == "whole\n"


def test_odd_names_and_widgets_leave_pages_that_work_without_the_web(book, tmp_path):
    widget = "import ipywidgets; ipywidgets.IntSlider()"
    notebook(tmp_path / "notebooks/it's <b>.ipynb", "x = 1", widget, "# [on](02_b.ipynb#part)", title="<i>T</i>")
    notebook(tmp_path / "notebooks/02_b.ipynb", "x = 1")
    result = book()
    assert result.returncode == 0, result.stderr
    site = tmp_path / "build/notebooks"
    page = (site / "it's <b>.html").read_text()
    assert "unpkg" not in page
    assert 'href="02_b.html#part"' in page
    index = (site / "index.html").read_text()
    assert "it%27s%20%3Cb%3E.html" in index
    assert "&lt;i&gt;T&lt;/i&gt;" in index


def test_pages_are_made_anew(book, tmp_path):
    notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1", "print('x is', x)")
    assert book().returncode == 0
    assert book("-p", "x", "2").returncode == 0
    assert "x is 2" in (tmp_path / "build/notebooks/00_one.html").read_text()


def test_a_kernel_that_dies_at_its_start_gets_a_second_one(book, tmp_path, monkeypatch):
    """Two that start at once can be given the same port."""
    spec = tmp_path / "share/kernels/python3"
    spec.mkdir(parents=True)
    fail_once = '[ -e died ] || { touch died; exit 1; }; exec "$0" -m ipykernel_launcher -f "$1"'
    command = ["sh", "-c", f"cd {tmp_path}; {fail_once}", sys.executable, "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebook(tmp_path / "notebooks/00_one.ipynb", "x = 0", "print('good')")
    result = book()
    assert (tmp_path / "died").exists()
    assert result.returncode == 0, result.stderr
    assert text_of(tmp_path / "build/notebooks/00_one.ipynb") == "good\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupted_nothing_goes_on(tmp_path, number):
    cell = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(3000)"
    notebook(tmp_path / "notebooks/00_long.ipynb", "x = 0", cell)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    words = [sys.executable, "-m", "vgglab.book"]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    _, said = process.communicate(timeout=MAX_WAIT_SECONDS)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "vgglab.book: interrupted"
    wait_until(lambda: not os.path.exists(f"/proc/{pid.read_text()}"))


HOSTILE = "<img src=x onerror=alert(1)>"


def made_hostile(value, keep=()):
    """The same structure with each text in it replaced, and each date by a list."""
    if isinstance(value, dict):
        return {name: entry if name in keep else made_hostile(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [made_hostile(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


class Handlers(HTMLParser):
    """Counts the elements of a page that would run something of the run directory's."""

    count = 0

    def handle_starttag(self, tag, attributes):
        self.count += ("onerror", "alert(1)") in attributes


def test_a_report_on_a_hostile_run_directory_runs_nothing(book, images, tmp_path):
    trained = python(
        "-m", "vgglab.train", *TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    run = Run(tmp_path / "run")
    env = made_hostile(run.env, keep=("host", "process"))
    (run.path / "env.json").write_text(json.dumps({**env, "started": [HOSTILE]}))
    events = [made_hostile(event, keep=("event", "status")) for event in run.events()]
    events.insert(1, {"event": "warning", "seconds": 0, "text": HOSTILE})
    (run.path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    folder = tmp_path / HOSTILE.replace("/", "")
    run.path.rename(folder)
    result = book(PROJECT / "notebooks/08_report.ipynb", "-p", "folders", folder)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "build/notebooks/08_report.html").read_text()
    assert "&lt;img src=x" in page
    for text in (page, f"<p {'onerror=alert(1)'}>"):
        handlers = Handlers()
        handlers.feed(text)
        assert handlers.count == (text is not page)
    pytest.importorskip("playwright")
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    pages = {name: tmp_path / f"{name}.html" for name in ("results", "broken", "open")}
    assert python("-m", "vgglab.view.results", folder, "--html", pages["results"]).returncode == 0
    # Unescaped markup in one of our pages, with our policy and without it.
    pages["broken"].write_text(page.replace("</nav>", f"</nav>{HOSTILE}<script>alert(2)</script>", 1))
    pages["open"].write_text(re.sub("<meta http-equiv=[^>]*>", "", pages["broken"].read_text()))
    with chromium() as browser:
        for file in (tmp_path / "build/notebooks/08_report.html", tmp_path / "build/notebooks/index.html"):
            assert done_by(browser, file) == []
        assert done_by(browser, pages["results"]) == []
        assert not [what for what in done_by(browser, pages["broken"]) if what.startswith("dialog")]
        assert {"dialog 1", "dialog 2"} <= set(done_by(browser, pages["open"]))
