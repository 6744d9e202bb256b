"""Notebook profiles: the values they set, values set by hand, and the table shown at the start."""

import json
import subprocess
import sys

import pytest

import vgglab
from vgglab.lab import machine_speed
from vgglab.lab.profiles import Profiles
from vgglab.view.summaries import metric

SETTINGS = {"model": ("vgg11_bn", "vgg16_bn", "vgg<16>"), "epochs": (2, 6, 90), "steps": (-1, 20, -1)}
PROFILES = Profiles(
    "timed", at_least={"steps": 3}, one_of={"data": ("digits", "fake")}, **SETTINGS, seconds=(1.0, 3.0, 10.0),
    data=("digits", "digits", "fake"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fixed_times(monkeypatch):
    monkeypatch.setattr(PROFILES, "seconds", 75)
    monkeypatch.setattr("vgglab.lab.profiles.slowdown", lambda: 2.0)


@pytest.mark.parametrize(("profile", "chosen"), [("quick", ["vgg11_bn", 2]), ("full", ["vgg<16>", 90])])
def test_profile_sets_values_that_are_not_set_by_hand(profile, chosen):
    assert PROFILES.choose(profile, model=None, epochs=None) == chosen
    assert PROFILES.choose(profile, model=None, epochs=1) == [chosen[0], 1]


def test_table_shows_profile_values_and_time(capsys):
    PROFILES.choose("quick", model="mine", epochs=None)
    text = capsys.readouterr().out
    assert "quick (selected)" in text
    assert "mine (set by hand)" in text
    assert "about 2 min 30 s" in text  # 75 s on a machine that is twice as fast
    assert "not timed" in text
    assert "an estimate: the notebook took 1 min 15 s on " + machine_speed.REFERENCE["machine"] in text
    assert "The expected time does not account for values set by hand." in text


def test_notebook_without_timing_shows_no_time(capsys):
    Profiles("mine", epochs=(1, 2, 3)).choose("quick", epochs=None)
    assert "about" not in capsys.readouterr().out


def test_table_is_html_in_a_notebook(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    PROFILES.choose("full", epochs=None)
    (table,) = shown
    assert "vgg&lt;16&gt;" in table._repr_html_()
    assert "full (selected)" in table._repr_html_()


def test_unknown_profile_is_rejected():
    with pytest.raises(vgglab.UserError, match="profile: 'fast' is not one of quick, small, full"):
        PROFILES.choose("fast", model=None)


def test_number_for_a_string_becomes_a_string():
    assert PROFILES.choose("quick", model=20261126) == ["20261126"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", value) for value in (0, -1, 1.5, "2", True)),
        *(("steps", value) for value in (0, -2)),
        *(("seconds", value) for value in (0, "a", float("nan"))),
    ],
)
def test_error_for_an_invalid_value_names_the_parameter(name, value):
    with pytest.raises(vgglab.UserError, match=f"^{name}: "):
        PROFILES.choose("quick", **{name: value})


def test_valid_values_are_accepted():
    assert PROFILES.choose("quick", steps=-1, seconds=0.2, epochs=1) == [-1, 0.2, 1]
    assert PROFILES.choose("quick", steps=3, data="fake") == [3, "fake"]
    with pytest.raises(vgglab.UserError, match=r"steps: 2 is neither -1 \(all\) nor a whole number of at least 3"):
        PROFILES.choose("quick", steps=2)
    with pytest.raises(vgglab.UserError, match="data: 'x' is not one of digits, fake"):
        PROFILES.choose("quick", data="x")


REPORT = {"simulated": False, "num_measured_steps": 3, "skip_steps": 10, "device": "cpu", "speed": 2.5}


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({}, "2.50"),
        ({"speed": None, "simulated": True, "num_measured_steps": 0}, "not measured (a simulated card has no speed)"),
        ({"speed": None, "num_measured_steps": 0}, "not measured (all steps fell within --skip-steps 10)"),
        ({"speed": None}, "not measured (not available on cpu)"),
        ({"speed": None, "test_only": True}, "not measured (a run with --test-only has no training steps)"),
    ],
)
def test_missing_metric_shows_the_reason(change, shown):
    assert metric({**REPORT, **change}, "speed") == shown


@pytest.fixture
def quick_measurement(monkeypatch):
    monkeypatch.setattr(machine_speed, "STEP_BENCHMARK_SECONDS", 0.0)
    monkeypatch.setattr(machine_speed, "COMPILE_BENCHMARK_SECONDS", 0.0)
    machine_speed.slowdown.cache_clear()
    yield
    machine_speed.slowdown.cache_clear()


def test_machine_is_measured_once_and_the_result_cached(monkeypatch, tmp_path, quick_measurement):
    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path / "cache"))
    first = machine_speed.slowdown()
    assert 0.01 < first < 1000
    machine_speed.slowdown.cache_clear()
    monkeypatch.setattr(machine_speed, "measure", lambda: pytest.fail("measured again"))
    assert machine_speed.slowdown() == first


def test_machine_three_times_slower_has_a_slowdown_of_three(monkeypatch, tmp_path, quick_measurement):
    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path))
    seconds = (3 * machine_speed.REFERENCE["step_seconds"], 3 * machine_speed.REFERENCE["compile_seconds"])
    monkeypatch.setattr(machine_speed, "measure", lambda: seconds)
    assert machine_speed.slowdown() == pytest.approx(3.0)
    (tmp_path / "machine_speed.json").write_text(json.dumps("odd"))
    machine_speed.slowdown.cache_clear()
    assert machine_speed.slowdown() == pytest.approx(3.0)


def test_measurement_needs_no_cache_and_restores_torch_state(monkeypatch, tmp_path, quick_measurement):
    torch = pytest.importorskip("torch")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path / "file" / "below"))
    before = torch.get_num_threads(), torch.random.get_rng_state()
    assert machine_speed.slowdown() > 0
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_measurement_works_without_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from vgglab.lab import machine_speed; machine_speed.COMPILE_BENCHMARK_SECONDS = 0\n"
        "print(machine_speed.slowdown())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) > 0
