"""The sizes of a notebook: what a rung sets, what a hand sets, and what is shown before it starts."""

import json
import subprocess
import sys

import pytest

import vgglab
from vgglab.lab import yardstick
from vgglab.view import timings
from vgglab.view.ladder import Ladder, one_of, whole
from vgglab.view.metric import metric

SETTINGS = {"model": ("vgg11_bn", "vgg16_bn", "vgg<16>"), "epochs": (2, 6, 90), "steps": (-1, 20, -1)}
LADDER = Ladder("timed", 2.0, **SETTINGS, seconds=(1.0, 3.0, 10.0))


@pytest.fixture(autouse=True)
def _timed(monkeypatch):
    monkeypatch.setattr(LADDER, "seconds", 75)


@pytest.mark.parametrize(("profile", "chosen"), [("quick", ["vgg11_bn", 2]), ("full", ["vgg<16>", 90])])
def test_a_rung_sets_what_is_not_set_by_hand(profile, chosen):
    assert LADDER.choose(profile, model=None, epochs=None) == chosen
    assert LADDER.choose(profile, model=None, epochs=1) == [chosen[0], 1]


def test_it_is_shown_with_the_time_as_text_and_as_html(capsys):
    LADDER.choose("quick", model="mine", epochs=None)
    text = capsys.readouterr().out
    assert "quick (selected)" in text
    assert "mine (set by hand)" in text
    assert "about 2 min 30 s" in text  # twice as slow as where it took 75 s
    assert "not timed" in text
    assert "an estimate for this machine: 1 min 15 s on " + timings.MACHINE in text
    assert "What was set by hand changes the time." in text


def test_one_that_is_not_in_the_table_promises_nothing(capsys):
    Ladder("mine", 2.0, epochs=(1, 2, 3)).choose("quick", epochs=None)
    assert "about" not in capsys.readouterr().out


def test_the_table_is_html_in_a_notebook(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    LADDER.choose("full", epochs=None)
    (table,) = shown
    assert "vgg&lt;16&gt;" in table._repr_html_()
    assert "full (selected)" in table._repr_html_()


def test_another_profile_is_refused_by_name():
    with pytest.raises(vgglab.UserError, match="profile: 'fast' is not one of quick, small, full"):
        LADDER.choose("fast", model=None)


def test_a_number_for_a_text_stays_text():
    assert LADDER.choose("quick", model=20261126) == ["20261126"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", value) for value in (0, -1, 1.5, "2", True)),
        *(("steps", value) for value in (0, -2)),
        *(("seconds", value) for value in (0, "a", float("nan"))),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_the_parameters_name(name, value):
    with pytest.raises(vgglab.UserError, match=f"^{name}: "):
        LADDER.choose("quick", **{name: value})


def test_what_makes_sense_is_taken():
    assert LADDER.choose("quick", steps=-1, seconds=0.2, epochs=1) == [-1, 0.2, 1]
    assert whole("n", 32, least=32) == 32
    with pytest.raises(vgglab.UserError, match="n: 31 is not a whole number of at least 32"):
        whole("n", 31, least=32)
    with pytest.raises(vgglab.UserError, match="weights: 'x' is not one of a, b"):
        one_of("weights", "x", ("a", "b"))


REPORT = {"simulated": False, "num_measured_steps": 3, "skip_steps": 10, "device": "cpu", "speed": 2.5}


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({}, "2.50"),
        ({"speed": None, "simulated": True, "num_measured_steps": 0}, "not measured (a simulated card has no speed)"),
        ({"speed": None, "num_measured_steps": 0}, "not measured (all steps fell within --skip-steps 10)"),
        ({"speed": None}, "not measured (not on cpu)"),
    ],
)
def test_a_figure_that_is_missing_says_why(change, shown):
    assert metric({**REPORT, **change}, "speed") == shown


@pytest.fixture
def quick_yardstick(monkeypatch):
    monkeypatch.setattr(yardstick, "STEPS_FOR_SECONDS", 0.0)
    monkeypatch.setattr(yardstick, "COMPILING_FOR_SECONDS", 0.0)
    yardstick.slowdown.cache_clear()
    yield
    yardstick.slowdown.cache_clear()


def test_the_machine_is_compared_once_and_the_next_kernel_takes_the_same(monkeypatch, tmp_path, quick_yardstick):
    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path / "cache"))
    first = yardstick.slowdown()
    assert 0.01 < first < 1000
    yardstick.slowdown.cache_clear()
    monkeypatch.setattr(yardstick, "measure", lambda: pytest.fail("measured again"))
    assert yardstick.slowdown() == first


def test_a_machine_three_times_as_slow_takes_three_times_as_long(monkeypatch, tmp_path, quick_yardstick):
    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path))
    seconds = (3 * timings.STEP_SECONDS, 3 * timings.COMPILE_SECONDS)
    monkeypatch.setattr(yardstick, "measure", lambda: seconds)
    assert yardstick.slowdown() == pytest.approx(3.0)
    (tmp_path / "yardstick.json").write_text(json.dumps("odd"))
    yardstick.slowdown.cache_clear()
    assert yardstick.slowdown() == pytest.approx(3.0)


def test_the_yardstick_needs_no_cache_and_leaves_torch_as_it_was(monkeypatch, tmp_path, quick_yardstick):
    torch = pytest.importorskip("torch")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path / "file" / "below"))
    before = torch.get_num_threads(), torch.random.get_rng_state()
    assert yardstick.slowdown() > 0
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_the_yardstick_works_without_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from vgglab.lab import yardstick; yardstick.COMPILING_FOR_SECONDS = 0\n"
        "print(yardstick.slowdown())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) > 0
