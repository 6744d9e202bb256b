"""``vgglab book``: notebooks executed headless, checked, and converted to HTML pages."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, NO_CHROMIUM, chromium, page_activity
from conftest import MAX_WAIT_SECONDS, PROJECT, TINY, wait_until
from processes import python

from vgglab import Run

pytest.importorskip("papermill")


def write_notebook(file, *cells, title="A title · 标题", alone=False):
    """Write a notebook: a cell that begins with # is Markdown; the first code cell contains the parameters."""
    written, is_first = [], True
    for number, source in enumerate([f"# {title}\n\nAt the end you know it. More of it.", *cells]):
        cell = {"id": f"cell-{number}", "metadata": {}, "source": source}
        if source.startswith("#"):
            written.append({**cell, "cell_type": "markdown"})
        else:
            cell["metadata"] = {"tags": ["parameters"]} if is_first else {}
            written.append({**cell, "cell_type": "code", "outputs": [], "execution_count": None})
            is_first = False
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "vgglab": {"alone": alone}}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"cells": written, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return file


@pytest.fixture
def book(tmp_path, monkeypatch, capfd):
    """``book("-p", "x", 1)``: run the command in this process, in a folder with its notebooks in ``notebooks/``."""
    from vgglab.commands import call

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))

    def run(*words):
        capfd.readouterr()
        code = call("book", [str(word) for word in words])
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def output_text(executed):
    outputs = [o for cell in json.loads(executed.read_text())["cells"] for o in cell.get("outputs", ())]
    return "".join("".join(output.get("text", ())) for output in outputs)


def test_parameters_go_to_notebooks_that_have_them_and_pages_are_linked(book, tmp_path):
    write_notebook(
        tmp_path / "notebooks/00_one.ipynb", "profile = 'quick'", "print('one is', profile)", "# [on](01_two.ipynb)"
    )
    write_notebook(tmp_path / "notebooks/01_two.ipynb", "device = 'auto'", "print('two on', device)", alone=True)
    result = book("-p", "profile", "full", "-p", "device", "cpu")
    assert result.returncode == 0, result.stderr
    site = tmp_path / "build/notebooks"
    assert output_text(site / "00_one.ipynb") == "one is full\n"
    assert output_text(site / "01_two.ipynb") == "two on cpu\n"
    page = (site / "00_one.html").read_text()
    assert "one is full" in page
    assert 'href="01_two.html"' in page
    index = (site / "index.html").read_text()
    assert "A title · 标题" in index
    assert "At the end you know it." in index
    assert "-p profile full" in index
    for file in site.glob("*.html"):
        # Self-contained: no script, style sheet or picture is loaded from elsewhere.
        assert not re.findall(
            r"<script[^>]+src|<link[^>]+href|<img[^>]+src=.https?:|url\(.?https?:|import .*https?:", file.read_text()
        )


def test_unknown_parameter_is_rejected_before_anything_runs(book, tmp_path):
    write_notebook(tmp_path / "notebooks/00_one.ipynb", "steps = 1", "open('ran', 'w')")
    result = book("-p", "step", "5")
    assert result.returncode == 2
    assert result.stderr == "vgglab.book: error: -p step: no such parameter; choose from steps\n"
    assert not (tmp_path / "ran").exists()


def test_string_that_looks_like_a_number_stays_a_string(book, tmp_path):
    write_notebook(
        tmp_path / "notebooks/00_one.ipynb", "folder = 'runs'\ncount = 1", "print(repr(folder), repr(count))"
    )
    assert book("-p", "folder", "007", "-p", "count", "7").returncode == 0
    assert output_text(tmp_path / "build/notebooks/00_one.ipynb") == "'007' 7\n"


def test_path_parameter_is_relative_to_the_current_directory(book, tmp_path):
    (tmp_path / "here.txt").write_text("found")
    write_notebook(tmp_path / "notebooks/00_one.ipynb", "path = ''", "print(open(path).read())")
    assert book("-p", "path", "here.txt").returncode == 0
    assert output_text(tmp_path / "build/notebooks/00_one.ipynb") == "found\n"


def test_failing_notebook_reports_cell_and_error_and_the_others_run(book, tmp_path):
    write_notebook(
        tmp_path / "notebooks/00_bad.ipynb", "x = 0", "print('before')", "# Divide", "1 / x", "print('after')"
    )
    write_notebook(tmp_path / "notebooks/01_good.ipynb", "x = 0", "print('good')")
    result = book()
    assert result.returncode == 1
    assert "cell 5 of 6, In [3], which begins: 1 / x\n  ZeroDivisionError: division by zero" in result.stderr
    site = tmp_path / "build/notebooks"
    assert output_text(site / "01_good.ipynb") == "good\n"
    assert "ZeroDivisionError" in (site / "index.html").read_text()
    assert "before" in (site / "00_bad.html").read_text()
    last = result.stdout.splitlines()[-1]
    assert last.startswith("1 of 2 notebooks failed after ")
    assert last.endswith("-m vgglab.book notebooks/00_bad.ipynb --out build/notebooks-again")


@pytest.mark.parametrize("name", ["00_one.ipynb", "00_one.html", "index.html"])
def test_user_files_in_the_output_folder_are_kept(book, tmp_path, name):
    source = write_notebook(tmp_path / "notebooks/00_one.ipynb", "x = 0")
    user_file = tmp_path / "mine" / name
    user_file.parent.mkdir()
    user_file.write_text(source.read_text() if name.endswith("ipynb") else "<p>my page</p>")
    before = user_file.read_text()
    result = book("--out", "mine")
    assert (result.returncode, user_file.read_text()) == (2, before)
    assert result.stderr.startswith("vgglab.book: error: --out mine: ")
    assert book("--out", "notebooks").returncode == 2  # the folder of the sources


def test_page_without_code_keeps_prose_and_outputs(book, tmp_path):
    file = write_notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1", "# A heading", "print('x', 'is', x)")
    assert book(file, "--no-code").returncode == 0
    page = (tmp_path / "build/notebooks/00_one.html").read_text()
    assert "A heading" in page
    assert "x is 1" in page
    assert "print" not in page.split("<body")[1]


PLOT_CELL = """from vgglab.view.figures import new_figure
figure, (panel,) = new_figure(1)
panel.plot([1, 2], label="of \\"a\\" & b")
panel.set(title="<A title>", xlabel="step", ylabel="loss")
figure"""


def test_page_figures_have_alt_text(book, tmp_path):
    assert book(write_notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1", PLOT_CELL)).returncode == 0
    page = (tmp_path / "build/notebooks/00_one.html").read_text()
    ((_, alt_text),) = re.findall(r"""<img alt=(["'])(.*?)\1""", page)
    assert html.unescape(alt_text) == '<A title>: loss over step (of "a" & b)'


def test_user_notebook_that_mentions_papermill_is_not_overwritten(book, tmp_path):
    source = write_notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1")
    user_file = write_notebook(tmp_path / "mine/00_one.ipynb", "x = 1", "# By papermill: -p x 2")
    before = user_file.read_text()
    assert book(source, "--out", "mine").returncode == 2
    assert user_file.read_text() == before


def test_executed_source_notebook_is_not_overwritten(book, tmp_path):
    source = write_notebook(tmp_path / "made/one.ipynb", "x = 1")
    content = json.loads(source.read_text())
    content["metadata"]["papermill"] = {}
    source.write_text(json.dumps(content))
    before = source.read_text()
    assert book(source, "--out", "made").returncode == 2
    assert source.read_text() == before


def test_conflicting_page_names_are_rejected(book, tmp_path):
    one, other = write_notebook(tmp_path / "a/same.ipynb", "x = 1"), write_notebook(tmp_path / "b/same.ipynb", "x = 1")
    assert "another page is also named same.html" in book(one, other).stderr
    assert book(write_notebook(tmp_path / "a/index.ipynb", "x = 1")).returncode == 2
    (tmp_path / "file").write_text("mine")
    assert "--out file: " in book(one, "--out", "file").stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_truncated_notebook_of_an_earlier_run_is_replaced(book, tmp_path):
    write_notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1", "print('whole')")
    half = tmp_path / "build/notebooks/00_one.ipynb"
    half.parent.mkdir(parents=True)
    half.write_text('{"metadata": {"papermill": {"start')
    assert book().returncode == 0
    assert output_text(half) == "whole\n"


def test_pages_with_odd_names_and_widgets_work_offline(book, tmp_path):
    widget = "import ipywidgets; ipywidgets.IntSlider()"
    write_notebook(tmp_path / "notebooks/it's <b>.ipynb", "x = 1", widget, "# [on](02_b.ipynb#part)", title="<i>T</i>")
    write_notebook(tmp_path / "notebooks/02_b.ipynb", "x = 1")
    result = book()
    assert result.returncode == 0, result.stderr
    site = tmp_path / "build/notebooks"
    page = (site / "it's <b>.html").read_text()
    assert "unpkg" not in page
    assert 'href="02_b.html#part"' in page
    index = (site / "index.html").read_text()
    assert "it%27s%20%3Cb%3E.html" in index
    assert "&lt;i&gt;T&lt;/i&gt;" in index


def test_pages_are_regenerated(book, tmp_path):
    write_notebook(tmp_path / "notebooks/00_one.ipynb", "x = 1", "print('x is', x)")
    assert book().returncode == 0
    assert book("-p", "x", "2").returncode == 0
    assert "x is 2" in (tmp_path / "build/notebooks/00_one.html").read_text()


def test_kernel_that_dies_at_startup_is_started_again(book, tmp_path, monkeypatch):
    """Two kernels that start at once may be given the same port."""
    spec = tmp_path / "share/kernels/python3"
    spec.mkdir(parents=True)
    fail_once = '[ -e died ] || { touch died; exit 1; }; exec "$0" -m ipykernel_launcher -f "$1"'
    command = ["sh", "-c", f"cd {tmp_path}; {fail_once}", sys.executable, "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    write_notebook(tmp_path / "notebooks/00_one.ipynb", "x = 0", "print('good')")
    result = book()
    assert (tmp_path / "died").exists()
    assert result.returncode == 0, result.stderr
    assert output_text(tmp_path / "build/notebooks/00_one.ipynb") == "good\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupt_also_ends_the_kernel(tmp_path, number):
    cell = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(3000)"
    write_notebook(tmp_path / "notebooks/00_long.ipynb", "x = 0", cell)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    words = [sys.executable, "-m", "vgglab.book"]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    _, stderr = process.communicate(timeout=MAX_WAIT_SECONDS)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "vgglab.book: interrupted"
    wait_until(lambda: not os.path.exists(f"/proc/{pid.read_text()}"))


PAYLOAD = "<img src=x onerror=alert(1)>"


def inject_payload(value, keep=()):
    """The same structure with each string replaced by the payload, except the entries in ``keep``."""
    if isinstance(value, dict):
        return {name: entry if name in keep else inject_payload(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [inject_payload(entry) for entry in value]
    return PAYLOAD if isinstance(value, str) else value


class HandlerCounter(HTMLParser):
    """Counts the elements of a page whose event handler would run the payload."""

    count = 0

    def handle_starttag(self, tag, attributes):
        self.count += ("onerror", "alert(1)") in attributes


def test_report_on_a_malicious_run_directory_runs_no_script(book, images, tmp_path):
    trained = python(
        "-m", "vgglab.train", *TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    run = Run(tmp_path / "run")
    env = inject_payload(run.env, keep=("host", "process"))
    (run.path / "env.json").write_text(json.dumps({**env, "started": [PAYLOAD]}))
    events = [inject_payload(event, keep=("event", "status")) for event in run.events()]
    events.insert(1, {"event": "warning", "seconds": 0, "text": PAYLOAD})
    (run.path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    folder = tmp_path / PAYLOAD.replace("/", "")
    run.path.rename(folder)
    result = book(PROJECT / "notebooks/08_report.ipynb", "-p", "folders", folder)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "build/notebooks/08_report.html").read_text()
    assert "&lt;img src=x" in page
    for text in (page, f"<p {'onerror=alert(1)'}>"):
        handlers = HandlerCounter()
        handlers.feed(text)
        assert handlers.count == (text is not page)
    pytest.importorskip("playwright")
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    pages = {name: tmp_path / f"{name}.html" for name in ("results", "broken", "open")}
    assert python("-m", "vgglab.view.results", folder, "--html", pages["results"]).returncode == 0
    # Unescaped markup in a page, with our content security policy and without it.
    pages["broken"].write_text(page.replace("</nav>", f"</nav>{PAYLOAD}<script>alert(2)</script>", 1))
    pages["open"].write_text(re.sub("<meta http-equiv=[^>]*>", "", pages["broken"].read_text()))
    with chromium() as browser:
        for file in (tmp_path / "build/notebooks/08_report.html", tmp_path / "build/notebooks/index.html"):
            assert page_activity(browser, file) == []
        assert page_activity(browser, pages["results"]) == []
        assert not [entry for entry in page_activity(browser, pages["broken"]) if entry.startswith("dialog")]
        assert {"dialog 1", "dialog 2"} <= set(page_activity(browser, pages["open"]))
