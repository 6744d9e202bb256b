"""Every notebook: clean in git, and run from top to bottom by papermill."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

from vgglab.view.timings import SECONDS

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
# What makes each short enough for a test; without a line here a notebook runs as it is.
SHORTER = {
    "00_start_here": {"model": "vgg11", "epochs": 2, "steps_per_epoch": 12},
    "02_data": {"seconds": 0.2},
    "03_performance": {"image_size": 32, "batch_size": 4, "steps": 10, "turns": 2},
    "04_convergence": {"steps": 6, "seeds": 2, "walk": 6},
    "05_many_cards": {"steps": 10},
    "06_gcu": {"num_ranks": 2},
    "07_what_vgg_sees": {"epochs": 1},
}
TRAINS_NOTHING = {"01_architecture"}
# What a sentence below an output says of it, where the output once said otherwise.
SAYS = {"02_data": r"first time .* 12 folders listed\nagain .* 0 folders listed\none more file .* 1 folders listed"}

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def cells_of(file, kind):
    return [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == kind]


def papermill(file, out, parameters, **environment):
    words = [sys.executable, "-m", "papermill", "--log-level=WARNING", "--cwd", str(file.parent), str(file), str(out)]
    for name, value in parameters.items():
        words += ["-p", name, str(value)]
    # Two tests at once on two cores: threads that wait for one another by spinning would take each other's time.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1000, check=False)


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_committed_without_outputs_and_for_any_kernel(file):
    content = json.loads(file.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"  # any other is NoSuchKernel elsewhere
    assert "widgets" not in content["metadata"]
    for cell in cells_of(file, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    tags = [tag for cell in cells_of(file, "code") for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1


@each_notebook
def test_short_cells_and_enough_prose(file):
    code = ["".join(cell["source"]).splitlines() for cell in cells_of(file, "code")]
    assert max(len(lines) for lines in code) <= 15
    num_words = sum(len("".join(cell["source"]).split()) for cell in cells_of(file, "markdown"))
    assert 5 <= num_words / sum(len(lines) for lines in code) <= 10  # headings included


CHINESE = re.compile("[\u4e00-\u9fff]")


@each_notebook
def test_opening_and_headings_are_in_both_languages(file):
    opening, *rest = ["".join(cell["source"]) for cell in cells_of(file, "markdown")]
    english, chinese = [part for part in opening.split("\n\n")[1:] if "At the end you" in part or "读完之后" in part]
    assert not CHINESE.search(english)
    assert CHINESE.search(chinese)
    headings = [line for text in (opening, *rest) for line in text.splitlines() if re.match("##? ", line)]
    assert len(headings) > 4
    for line in headings:
        english, _, chinese = line.partition(" · ")
        assert not CHINESE.search(english)
        assert CHINESE.search(chinese), line


@each_notebook
def test_says_how_large_and_how_long_before_it_starts(file):
    first, second = ["".join(cell["source"]) for cell in cells_of(file, "code")[:2]]
    assert first.startswith('profile = "quick"')
    assert re.search(rf'Ladder\(\s*"{file.stem}",\s*slowdown\(\),', second)
    assert file.stem in SECONDS


@each_notebook
def test_ends_with_exercises_that_are_checked_and_a_way_onward(file):
    cells = json.loads(file.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    (start,) = [number for number, text in enumerate(texts) if "Try it yourself" in text]
    behind = [(cell["cell_type"], text) for cell, text in zip(cells[start:], texts[start:])]
    assert [text for kind, text in behind if kind == "code" and "not yet: " in text and '"right"' in text]
    assert [text for kind, text in behind if kind == "markdown" and "<details>" in text]
    assert re.search(r"\]\(\d\d_\w+\.ipynb\)", texts[-1])


@each_notebook
def test_links_lead_somewhere(file):
    for cell in cells_of(file, "markdown"):
        for name in re.findall(r"\]\((\w+\.ipynb)\)", "".join(cell["source"])):
            assert (file.parent / name).is_file(), name


@each_notebook
def test_runs_from_top_to_bottom(file, tmp_path):
    out = tmp_path / file.name
    result = papermill(file, out, {"output_dir": tmp_path, **SHORTER.get(file.stem, {})})
    assert result.returncode == 0, result.stderr[-3000:]
    outputs = [output for cell in cells_of(out, "code") for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    texts = "".join("".join(output.get("text", "")) for output in outputs)
    assert re.search(SAYS.get(file.stem, ""), texts)
    # Nobody watched: no widget is left behind, which a report could not show, and no flood of updates.
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" not in shown
    assert "image/png" in shown
    # A figure that the front end could not draw leaves its name.
    assert not [output for output in outputs if "<Figure size" in "".join(output.get("data", {}).get("text/plain", ""))
                and "image/png" not in output["data"]]  # fmt: skip
    # And each picture is told in words as well.
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert all(len(output["metadata"]["image/png"]["alt"].split()) > 2 for output in drawn)
    assert len(outputs) < 3 * len(cells_of(out, "code"))
    assert bool(list(tmp_path.glob("runs/*/report.json"))) == (file.stem not in TRAINS_NOTHING)


def test_a_run_that_fails_fails_the_cell_and_the_batch(tmp_path):
    (file,) = [file for file in NOTEBOOKS if file.stem == "00_start_here"]
    out = tmp_path / "out.ipynb"
    result = papermill(file, out, {"output_dir": tmp_path, "model": "vgg12"})
    assert result.returncode != 0
    assert "--model: invalid choice" in result.stderr
    last = [cell for cell in cells_of(out, "code") if cell["outputs"]][-1]
    assert "vgglab.launch" in "".join(last["source"])  # the cells behind it did not run
