"""The doctor, on a healthy machine and on broken installs; and what ``--device gcu`` says on the same."""

import html
import json
import os
from pathlib import Path

import pytest
from conftest import MAX_WAIT_SECONDS, PROJECT, shell
from test_devices import needs_sim

from vgglab.commands.doctor import Diagnosis
from vgglab.devices.doubles import EAGER, LAZY

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
PATIENT = None  # see patient()


@pytest.fixture(scope="module", autouse=True)
def patient(tmp_path_factory):
    """A folder on every ``PYTHONPATH`` here: on a busy machine a library is slow to load, and does not hang."""
    global PATIENT
    PATIENT = tmp_path_factory.mktemp("patient")
    code = f"import vgglab.devices.checkup as checkup\ncheckup.TIMEOUT_SECONDS = {MAX_WAIT_SECONDS}\n"
    (PATIENT / "sitecustomize.py").write_text(code)


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A folder with a torchvision that is loaded at once, for what is not about it."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "torchvision.py").write_text("")
    return folder


def environment(*folders, **variables):
    clean = {name: value for name, value in os.environ.items() if name != AUTOLOAD}
    return {**clean, "PYTHONPATH": os.pathsep.join(map(str, (PROJECT, PATIENT, *folders))), **variables}


def diagnose(*folders, **variables):
    """``(exit code, the JSON object)`` with these folders importable and these variables set."""
    result = shell("python", "-m", "vgglab.doctor", "--json", env=environment(*folders, **variables))
    assert "Traceback" not in result.stderr
    return result.returncode, json.loads(result.stdout.strip().splitlines()[-1])


def fake_torch_gcu(folder: Path, body: str, is_loaded_with_torch: bool = False) -> Path:
    (folder / "torch_gcu").mkdir()
    (folder / "torch_gcu/__init__.py").write_text(body)
    if is_loaded_with_torch:
        record = folder / "torch_gcu-2.10.0.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_gcu\nVersion: 2.10.0\n")
        (record / "entry_points.txt").write_text("[torch.backends]\ntorch_gcu = torch_gcu:_autoload\n")
    return folder


def train_on_gcu(tmp_path, *folders, **variables):
    words = ["python", "-m", "vgglab.train", "--device=gcu", "--data-path=digits", "--run-dir=run"]
    return shell(*words, env=environment(*folders, **variables), cwd=tmp_path)


def all_text(findings):
    return " ".join(item["problem"] + " " + item["fix"] for item in findings["problems"])


def test_a_machine_without_cards_is_healthy():
    code, findings = diagnose()
    assert (code, findings["problems"]) == (0, [])
    assert findings["facts"]["torch_gcu"] is None
    assert findings["auto"] in ("cpu", "cuda", "mps")
    assert any("gcu-sim" in note for note in findings["notes"])


def test_text_for_a_terminal_and_one_line_for_a_bad_flag(light):
    text = shell("python", "-m", "vgglab.doctor", env=environment(light, ENFLAME_LOG_DEBUG_LEVEL="DEBUG")).stdout
    assert "--device auto" in text
    assert text.strip().endswith("no problems found")
    assert "debug output slows down every step" in text
    bad = shell("python", "-m", "vgglab.doctor", "--nonsense")
    assert (bad.returncode, len(bad.stderr.strip().splitlines())) == (2, 1)


@pytest.mark.parametrize(("package", "named"), [("torchvision", "torchvision cannot"), ("torch", "torch cannot")])
def test_which_of_torch_and_torchvision_is_broken(tmp_path, package, named):
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code, findings = diagnose(tmp_path)
    assert code == 1
    assert f"{named} be imported: operator torchvision::nms" in findings["problems"][0]["problem"]
    assert ("cuda cards" in findings["facts"]) == (package == "torchvision")


def test_a_library_that_ends_the_process_is_answered_in_one_line(tmp_path):
    """It was taken for the end of the run: no word, and the library's own exit code."""
    result = train_on_gcu(tmp_path, fake_torch_gcu(tmp_path, "raise SystemExit(3)"))
    assert result.returncode == 2
    assert "torch_gcu cannot be loaded (SystemExit: 3)" in result.stderr


@needs_sim
def test_a_library_that_raises_when_torch_loads_it(tmp_path, light):
    body = "raise OSError('libtopsrt.so: cannot open shared object file')"
    broken = fake_torch_gcu(tmp_path, body, is_loaded_with_torch=True)
    code, findings = diagnose(broken, light)
    assert code == 1
    assert "libtopsrt.so" in all_text(findings)
    assert "LD_LIBRARY_PATH=/opt/tops/lib" in all_text(findings)
    assert findings["facts"]["torch"] is not None
    assert findings["auto"].startswith("error: ")
    refusal = train_on_gcu(tmp_path, broken)
    assert (refusal.returncode, len(refusal.stderr.strip().splitlines())) == (2, 1)
    assert "libtopsrt.so" in refusal.stderr
    assert "vgglab.doctor" in refusal.stderr
    # Who does not ask for the card trains without it.
    words = ["python", "-m", "vgglab.train", "--device=cpu", "--model=vgg11", "--epochs=1", "--run-dir=cpu"]
    short = ["--training-step-per-epoch=1", "--eval-step-per-epoch=1", "--workers=0"]
    assert shell(*words, *short, env=environment(broken), cwd=tmp_path).returncode == 0


def test_a_library_that_kills_its_process(tmp_path, light):
    code, findings = diagnose(fake_torch_gcu(tmp_path, "import os; os.abort()"), light)
    assert code == 1
    assert "the process exited abnormally (signal 6)" in all_text(findings)


def test_a_library_of_no_known_generation(tmp_path, light):
    folder = fake_torch_gcu(tmp_path, "__version__ = '9'")
    code, findings = diagnose(folder, light)
    assert code == 1
    assert "unknown generation of torch_gcu" in all_text(findings)
    assert "unknown generation of torch_gcu" in train_on_gcu(tmp_path, folder).stderr


@needs_sim
def test_a_driver_that_does_not_answer(light):
    code, findings = diagnose(EAGER, light, VGGLAB_SIM_CARDS="0")
    assert code == 1
    assert findings["facts"]["driver"] == "no response"
    assert "finds no card" in all_text(findings)
    assert findings["auto"] != "gcu"


@needs_sim
def test_a_card_named_twice_and_a_switch_in_capitals(light):
    code, findings = diagnose(EAGER, light, TOPS_VISIBLE_DEVICES="0,0", TORCH_GCU_ENABLE_INT64_AND_UINT64="True")
    assert code == 1
    assert "names a card twice" in all_text(findings)
    assert "TORCH_GCU_ENABLE_INT64_AND_UINT64=True is read as false" in all_text(findings)


def test_the_lazy_generation_is_known_by_its_name(light):
    code, findings = diagnose(LAZY, light, CUDA_VISIBLE_DEVICES="")
    assert (code, findings["problems"]) == (0, [])
    facts = findings["facts"]
    assert (facts["generation"], len(facts["gcu cards"]), facts["eccl"], facts["driver"]) == (
        "lazy",
        8,
        True,
        "responds",
    )
    assert findings["auto"] == "gcu"


@pytest.mark.parametrize("text", ["<b>&", "a card"])
def test_the_table_is_safe_to_show(text):
    table = Diagnosis({"--device auto": text}, [{"problem": text, "fix": text}], [text])._repr_html_()
    assert table.count(html.escape(text)) == 4
    assert "<b>" not in table
