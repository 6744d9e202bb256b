"""Every notebook: committed without outputs, and runs from top to bottom with papermill."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from conftest import PROJECT
from forking import FORKED
from processes import NARROW, NARROW_PATH, all_narrow, python

from vgglab.errors import UserError
from vgglab.lab.machine_speed import REFERENCE

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
FILES = {file.stem[:2]: file for file in NOTEBOOKS}
# The smallest values that still run every cell; the data set is smaller, too (few_digits).
SMALLEST_VALUES = {
    "00": {"model": "vgg11", "epochs": 1, "steps_per_epoch": 4},
    "01": {"image_size": 32},
    "02": {"seconds": 0.1},
    "03": {"image_size": 32, "batch_size": 2, "steps": 6, "turns": 1},
    "04": {"model": "vgg11", "epochs": 1, "steps": 2, "batch_size": 4, "eval_steps": 1, "seeds": 2, "walk": 2},
    "05": {"steps": 4, "rounds": 1},
    "06": {"steps": 1},
    "07": {"model": "vgg11", "epochs": 1},
    "08": {},
}
WITHOUT_TRAINING = {"01_architecture"}
# Run with an eighth of the paper's channels; the other notebooks, and all in the long suite, have all channels.
NARROW_NOTEBOOKS = {"02", "03", "04", "05", "06", "07", "08"}
# Outputs that the text below them describes, and that once differed from it.
EXPECTED_OUTPUT = {
    "00": r"train_fps_mean: not measured \(all steps fell within --skip-steps 10\)",
}

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def cells_of(file, kind):
    return [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == kind]


def run_papermill(file, out, parameters, **environment):
    # A long timeout for busy machines; pytest's own limit detects hangs.
    words = ["-m", "papermill", "--log-level=WARNING", "--start-timeout=1000"]
    words += ["--cwd", str(file.parent), str(file), str(out)]
    for name, value in parameters.items():
        words += ["-p", name, str(value)]
    # Two tests at once on two cores: spinning OpenMP threads would slow each other down.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    return python(*words, env=environment)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """A cache in which ``digits`` has only 260 training and 40 held-out images, of all ten classes."""
    from vgglab.data.digits import NAME, digits_folder

    cache = tmp_path_factory.mktemp("few")
    for split, count in (("train", 260), ("val", 40)):
        lines = (digits_folder() / f"{split}_list.txt").read_text().splitlines()
        by_class = [[line for line in lines if line.endswith(f" {label}")] for label in range(10)]
        chosen = [line for row in zip(*by_class) for line in row][:count]
        for line in chosen:
            image = cache / NAME / split / line.rpartition(" ")[0]
            image.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(digits_folder() / split / line.rpartition(" ")[0], image)
        (cache / NAME / f"{split}_list.txt").write_text("\n".join(chosen) + "\n")
    return cache


@pytest.fixture
def execute(few_digits, tmp_path, request):
    """``execute("00", device="cpu")``: run the notebook with its smallest values and these; its cells' outputs."""
    is_long = request.node.get_closest_marker("long")

    def run(number, error_pattern="", **parameters):
        file, out = FILES[number], tmp_path / "out.ipynb"
        values = {"output_dir": tmp_path, **SMALLEST_VALUES[number], **parameters}
        values = {name: value for name, value in values.items() if value is not None}
        # No network access: a proxy that does not exist makes any request fail at once.
        environment = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
        environment[FORKED] = "0" if is_long else "1"
        if (few_digits / "machine_speed.json").exists():  # only the first notebook measures the machine's speed
            os.utime(few_digits / "machine_speed.json")
        if number in NARROW_NOTEBOOKS and not is_long:
            environment[NARROW] = all_narrow()
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NARROW_PATH), os.environ.get("PYTHONPATH")]))
        result = run_papermill(file, out, values, VGGLAB_CACHE=str(few_digits), **environment)
        outputs = [output for cell in cells_of(out, "code") for output in cell["outputs"]]
        errors = [output for output in outputs if output["output_type"] == "error"]
        if error_pattern:
            (error,) = errors
            assert (result.returncode != 0, error["ename"]) == (True, "UserError"), result.stderr[-3000:]
            assert re.search(error_pattern, error["evalue"]), error["evalue"]
            assert "\n" not in error["evalue"]
        else:
            assert result.returncode == 0, result.stderr[-3000:]
            assert not errors
            assert re.search(EXPECTED_OUTPUT.get(number, "") if not parameters else "", output_text(outputs))
            assert not re.search(r"\bnan\b|\bNone\b", output_text(outputs)), output_text(outputs)
        return outputs

    return run


def output_text(outputs):
    return "".join("".join(output.get("text", "")) for output in outputs)


def test_notebooks_are_found():
    assert NOTEBOOKS


@each_notebook
def test_notebook_has_no_outputs_and_a_standard_kernel(file):
    content = json.loads(file.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"  # any other raises NoSuchKernel on other machines
    assert "widgets" not in content["metadata"]
    for cell in cells_of(file, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    tags = [tag for cell in cells_of(file, "code") for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1


@each_notebook
def test_notebook_has_short_cells_and_enough_prose(file):
    code = ["".join(cell["source"]).splitlines() for cell in cells_of(file, "code")]
    assert max(len(lines) for lines in code) <= 15
    num_words = sum(len("".join(cell["source"]).split()) for cell in cells_of(file, "markdown"))
    assert 5 <= num_words / sum(len(lines) for lines in code) <= 12  # headings included


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
def test_notebook_shows_its_profile_and_time_first(file):
    first, second = ["".join(cell["source"]) for cell in cells_of(file, "code")[:2]]
    assert first.startswith('profile = "quick"')
    assert re.search(rf'Profiles\(\s*"{file.stem}",', second)
    assert file.stem in REFERENCE["seconds"]


@each_notebook
def test_notebook_ends_with_checked_exercises_and_a_link(file):
    cells = json.loads(file.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    (start,) = [number for number, text in enumerate(texts) if "Try it yourself" in text]
    ending = [(cell["cell_type"], text) for cell, text in zip(cells[start:], texts[start:])]
    assert [text for kind, text in ending if kind == "code" and "not yet: " in text and '"right"' in text]
    assert [text for kind, text in ending if kind == "markdown" and "<details>" in text]
    assert re.search(r"\]\(\d\d_\w+\.ipynb\)", texts[-1])


@each_notebook
def test_linked_notebooks_exist(file):
    for cell in cells_of(file, "markdown"):
        for name in re.findall(r"\]\((\w+\.ipynb)\)", "".join(cell["source"])):
            assert (file.parent / name).is_file(), name


@each_notebook
def test_notebook_runs_from_top_to_bottom(file, execute, tmp_path):
    outputs = execute(file.stem[:2])
    # Headless: no widgets, which a report cannot show, and not an output for each update.
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" not in shown
    assert "image/png" in shown
    # A figure that could not be rendered leaves only its repr.
    assert not [output for output in outputs if "<Figure size" in "".join(output.get("data", {}).get("text/plain", ""))
                and "image/png" not in output["data"]]  # fmt: skip
    # Each figure has alt text.
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert all(len(output["metadata"]["image/png"]["alt"].split()) > 2 for output in drawn)
    assert len(outputs) < 3 * len(cells_of(file, "code"))
    assert bool(list(tmp_path.glob("runs/*/report.json"))) == (file.stem not in WITHOUT_TRAINING)


long = pytest.mark.long  # not in the regular suite
# Each choice of each parameter, and the smallest valid numbers.
VALUES = [
    pytest.param("00", {"device": "gcu-sim", "steps_per_epoch": 1}, id="00-simulated"),
    pytest.param("00", {"device": "cpu", "steps_per_epoch": 1}, id="00-cpu", marks=long),
    pytest.param("00", {"profile": "small", "model": None}, id="00-small", marks=long),
    pytest.param("00", {"profile": "full", "model": None}, id="00-full", marks=long),
    pytest.param("01", {"profile": "small", "model": "vgg11"}, id="01-small", marks=long),
    pytest.param("01", {"profile": "full", "image_size": None}, id="01-full", marks=long),
    pytest.param("02", {"profile": "small", "data_path": ""}, id="02-small", marks=long),
    pytest.param("02", {"profile": "full", "data_path": "", "seconds": 0.1}, id="02-full", marks=long),
    pytest.param("03", {"device": "cpu", "batch_size": 1, "steps": 1}, id="03-one-step", marks=long),
    pytest.param("03", {"profile": "small", "model": "vgg11_bn", "steps": 4}, id="03-small", marks=long),
    pytest.param("03", {"profile": "full", "steps": 2}, id="03-full", marks=long),
    pytest.param("04", {"device": "gcu-sim", "seeds": 1, "steps": 1}, id="04-simulated", marks=long),
    pytest.param("04", {"device": "cpu", "ranks": 2, "seeds": 1}, id="04-ranks", marks=long),
    pytest.param("04", {"profile": "small", "recipe": "paper", "walk": 3}, id="04-paper", marks=long),
    pytest.param("04", {"recipe": "modern", "model": None}, id="04-modern", marks=long),
    pytest.param("04", {"recipe": "seed", "data": "digits"}, id="04-seed", marks=long),
    pytest.param("04", {"profile": "full", "data": "digits", "recipe": "quick"}, id="04-full", marks=long),
    pytest.param("05", {"device": "gcu-sim", "steps": 4}, id="05-simulated", marks=long),
    pytest.param("05", {"device": "cpu", "max_ranks": 1, "steps": 4}, id="05-one-rank", marks=long),
    pytest.param("05", {"profile": "small", "model": "vgg13_bn", "max_ranks": 4}, id="05-small", marks=long),
    pytest.param("05", {"profile": "full", "model": "vgg11", "max_ranks": 2}, id="05-full", marks=long),
    pytest.param("06", {"num_ranks": 1}, id="06-one-card", marks=long),
    pytest.param("06", {"profile": "small", "num_ranks": 3}, id="06-small", marks=long),
    pytest.param("06", {"profile": "full", "num_ranks": 2}, id="06-full", marks=long),
    pytest.param("07", {"device": "gcu-sim", "steps_per_epoch": 1}, id="07-simulated", marks=long),
    pytest.param("07", {"device": "cpu", "weights": "digits"}, id="07-digits", marks=long),
    pytest.param("07", {"profile": "small", "steps_per_epoch": 1}, id="07-small", marks=long),
    pytest.param("07", {"profile": "full", "weights": "digits", "model": "vgg11_bn"}, id="07-full", marks=long),
    pytest.param("08", {"profile": "small", "most": 1}, id="08-small", marks=long),
    pytest.param("08", {"profile": "full", "title": "2026"}, id="08-full", marks=long),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("number", "parameters"), VALUES)
def test_notebook_runs_with_every_choice(number, parameters, execute):
    output = output_text(execute(number, **parameters))
    if parameters.get("device") == "gcu-sim" and number != "07":  # which shows no speed
        assert "not measured (a simulated card has no speed)" in output


# Values that cannot work on this machine give a one-line error, whichever cell fails.
UNAVAILABLE = [
    pytest.param("00", {"device": "cuda"}, "^--device cuda: ", id="00-cuda"),
    *(
        pytest.param("00", {"device": name}, f"^--device {name}: ", id=f"00-{name}", marks=long)
        for name in ("mps", "gcu")
    ),
    *(
        pytest.param(number, {"device": "mps"}, "--device mps: ", id=f"{number}-mps", marks=long)
        for number in ("03", "04", "05", "07")
    ),
    pytest.param(
        "04", {"profile": "full", "data": None, "model": None}, "imagenet: no such folder", id="04-full", marks=long
    ),
    pytest.param(
        "07",
        {"weights": "imagenet"},
        "^--pretrained: cannot download the weights of vgg16",
        id="07-imagenet",
        marks=long,
    ),
    pytest.param("07", {"photograph": "none.jpg"}, "^photograph: ", id="07-photograph", marks=long),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("number", "parameters", "line"), UNAVAILABLE)
def test_unavailable_value_gives_a_one_line_error(number, parameters, line, execute):
    execute(number, error_pattern=line, **parameters)


INVALID = [
    *((number, {"profile": "tiny"}, "profile") for number in FILES),
    ("00", {"epochs": 0}, "epochs"),
    ("00", {"steps_per_epoch": 0}, "steps_per_epoch"),
    ("01", {"image_size": 16}, "image_size"),
    ("02", {"seconds": 0}, "seconds"),
    ("02", {"profile": "full"}, "data_path imagenet: no such folder"),
    ("02", {"data_path": "fake"}, "data_path fake: no such folder"),
    ("03", {"device": "gcu-sim"}, "device"),
    ("03", {"image_size": 31}, "image_size"),
    *(("03", {name: 0}, name) for name in ("batch_size", "steps", "turns")),
    *(("04", {name: 0}, name) for name in ("epochs", "steps", "batch_size", "eval_steps", "seeds", "ranks")),
    ("04", {"walk": 1}, "walk"),
    ("05", {"steps": 3}, "steps"),
    ("05", {"max_ranks": 3}, "max_ranks"),
    ("05", {"rounds": 0}, "rounds"),
    *(("06", {name: 0}, name) for name in ("num_ranks", "steps")),
    ("07", {"weights": "imagenette"}, "weights"),
    ("07", {"epochs": "two"}, "epochs"),
    ("08", {"most": 0}, "most"),
]


@pytest.mark.parametrize(("number", "parameters", "message"), INVALID)
def test_second_cell_rejects_invalid_values(number, parameters, message, monkeypatch, capsys):
    monkeypatch.setattr("vgglab.lab.profiles.slowdown", lambda: 1.0)
    first, second = ["".join(cell["source"]) for cell in cells_of(FILES[number], "code")[:2]]
    names = {}
    exec(first, names)
    assert set(parameters) <= set(names)
    names.update(parameters)
    with pytest.raises(UserError, match=f"^{message}"):
        exec(second, names)


@pytest.mark.parametrize(
    ("device", "num_cards", "selected"), [("auto", 1, "cpu"), ("auto", 2, "auto"), ("cuda", 1, "cuda")]
)
def test_ranks_share_the_cpu_if_there_are_too_few_cards(device, num_cards, selected, monkeypatch, capsys):
    """On a machine with one CUDA card, rank 1 found none."""
    import vgglab

    monkeypatch.setattr("vgglab.lab.profiles.slowdown", lambda: 1.0)
    monkeypatch.setattr(vgglab, "open_device", lambda name: SimpleNamespace(num_cards=num_cards), raising=False)
    first, second = ["".join(cell["source"]) for cell in cells_of(FILES["05"], "code")[:2]]
    names = {}
    exec(first, names)
    names["device"] = device
    exec(second, names)
    assert (names["device"], names["max_ranks"]) == (selected, 2)
    assert ("this machine has 1 card for 2 ranks" in capsys.readouterr().out) == (selected == "cpu")


def test_folder_with_a_numeric_name_is_accepted(execute, tmp_path, monkeypatch):
    """papermill converts the name to a number."""
    execute("08", error_pattern="^20261126: no such folder$", folders="20261126", title="2026")


def test_failed_run_stops_the_notebook(execute, tmp_path):
    execute("00", error_pattern="--model: invalid choice", model="vgg12")
    last = [cell for cell in cells_of(tmp_path / "out.ipynb", "code") if cell["outputs"]][-1]
    assert "vl.launch" in "".join(last["source"])  # later cells did not run
