"""The doctor on a healthy machine and with broken installs, and the errors of ``--device gcu`` with the latter."""

import html
import inspect
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import MAX_WAIT_SECONDS, PROJECT, shell
from processes import python
from test_devices import CAN_SIMULATE, needs_sim

from vgglab.commands import doctor
from vgglab.commands.doctor import Diagnosis
from vgglab.devices.checkup import Checkup
from vgglab.devices.doubles import EAGER, LAZY

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
LONG_TIMEOUT = None  # the folder of long_timeout()


@pytest.fixture(scope="module", autouse=True)
def long_timeout(tmp_path_factory):
    """Raise the doctor's timeout in every test: on a busy machine, a library may load slowly without hanging."""
    global LONG_TIMEOUT
    LONG_TIMEOUT = tmp_path_factory.mktemp("timeout")
    code = f"import vgglab.devices.checkup as checkup\ncheckup.TIMEOUT_SECONDS = {MAX_WAIT_SECONDS}\n"
    (LONG_TIMEOUT / "sitecustomize.py").write_text(code)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """A folder with an empty torchvision, which loads quickly, for tests that do not need the real one."""
    folder = tmp_path_factory.mktemp("torchvision")
    (folder / "torchvision.py").write_text("")
    return folder


def test_every_check_is_performed():
    """A check that ``run`` does not call would never report anything."""
    checks = [name for name in vars(Checkup) if name.startswith("_check")]
    called = {
        name
        for function in vars(Checkup).values()
        if inspect.isfunction(function)
        for name in function.__code__.co_names
    }
    assert len(checks) >= 4
    assert {*checks} <= called


def environment(*folders, **variables):
    clean = {name: value for name, value in os.environ.items() if name != AUTOLOAD}
    return {**clean, "PYTHONPATH": os.pathsep.join(map(str, (PROJECT, LONG_TIMEOUT, *folders))), **variables}


def diagnose(*folders, **variables):
    """``(exit code, the JSON object)`` with these folders importable and these variables set."""
    result = shell("python", "-m", "vgglab.doctor", "--json", env=environment(*folders, **variables))
    assert "Traceback" not in result.stderr
    return result.returncode, json.loads(result.stdout.strip().splitlines()[-1])


class ForkedProbes:
    """Stands for ``subprocess`` in the doctor: its probes are forked, and need not import torch again."""

    DEVNULL, TimeoutExpired = subprocess.DEVNULL, subprocess.TimeoutExpired

    @staticmethod
    def run(command, env, **_):
        result = python(*command[1:], env=env, autoload=CAN_SIMULATE)
        result.stdout = result.stdout.encode()
        return result


@pytest.fixture
def diagnose_here(monkeypatch, capsys, stubs):
    """``diagnose`` in this process, with an empty torchvision and forked probes.

    It cannot test what happens while Python starts or while torch is imported; for that, use ``diagnose``.
    """

    def run_doctor(*folders, flags=("--json",), **variables):
        path = os.pathsep.join(map(str, (*folders, stubs, PROJECT)))
        for name, value in {**variables, "PYTHONPATH": path}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv(AUTOLOAD, raising=False)
        monkeypatch.setattr("vgglab.devices.checkup.subprocess", ForkedProbes)
        for folder in folders:
            monkeypatch.syspath_prepend(folder)  # to find torch_gcu
        code = doctor.main(flags)
        out = capsys.readouterr().out
        return code, json.loads(out) if flags else out

    return run_doctor


def fake_library(folder: Path, body: str, is_loaded_with_torch: bool = False, name: str = "torch_gcu") -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(body)
    if is_loaded_with_torch:
        record = folder / f"{name}-2.10.0.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.10.0\n")
        (record / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {name}:_autoload\n")
    return folder


def train_on_gcu(tmp_path, folder):
    """In a process that has already imported torch, without the card's library."""
    args = ["-m", "vgglab.train", "--device=gcu", "--data-path=digits", "--run-dir=run"]
    return python(*args, env=environment(folder), cwd=tmp_path)


def all_text(findings):
    return " ".join(item["problem"] + " " + item["fix"] for item in findings["problems"])


def test_a_machine_without_cards_is_healthy():
    code, findings = diagnose()
    assert (code, findings["problems"]) == (0, [])
    assert findings["facts"]["torch_gcu"] is None
    assert findings["auto"] in ("cpu", "cuda", "mps")
    assert "cpu" in findings["facts"]["devices"]
    assert any("gcu-sim" in note for note in findings["notes"])


def test_the_text_output_and_the_error_for_a_bad_flag(diagnose_here):
    _, text = diagnose_here(flags=[], ENFLAME_LOG_DEBUG_LEVEL="DEBUG")
    assert "--device auto" in text
    assert text.strip().endswith("no problems found")
    assert "debug output slows down every step" in text
    bad = shell("python", "-m", "vgglab.doctor", "--nonsense")
    assert (bad.returncode, len(bad.stderr.strip().splitlines())) == (2, 1)


@pytest.mark.parametrize(("package", "named"), [("torchvision", "torchvision cannot"), ("torch", "torch cannot")])
def test_a_broken_torch_or_torchvision_is_identified(tmp_path, package, named):
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code, findings = diagnose(tmp_path)
    assert code == 1
    assert f"{named} be imported: operator torchvision::nms" in findings["problems"][0]["problem"]
    assert ("cuda cards" in findings["facts"]) == (package == "torchvision")


def test_a_library_that_exits_is_reported_in_one_line(tmp_path):
    """It used to end the run without a message, with the library's exit code."""
    result = train_on_gcu(tmp_path, fake_library(tmp_path, "raise SystemExit(3)"))
    assert result.returncode == 2
    assert "torch_gcu cannot be loaded (SystemExit: 3)" in result.stderr


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("os.abort()", "the process exited abnormally (signal 6)"),
        ("raise vgglab.errors.UserError('--device new: libnew.so is missing')", "--device new: libnew.so is missing"),
    ],
)
def test_a_device_check_that_fails_is_a_problem_of_its_own(tmp_path, diagnose_here, failure, reason):
    """For a library that no check is written for, `vgglab doctor` reported no problem, although training failed.

    A driver may crash when a device is opened; torch and torchvision are checked in the same process.
    """
    code = f"import os, vgglab.devices\ndef fail(*_):\n    {failure}\nvgglab.devices.availability = fail\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    code, findings = diagnose_here(tmp_path)
    assert (code, findings["facts"]["--device auto"]) == (1, f"error: {reason}")
    assert [item["problem"] for item in findings["problems"]] == [f"--device auto fails: {reason}"]
    assert "cuda cards" in findings["facts"]  # torch is not mistaken for the cause


def test_a_library_that_finds_no_card_is_a_problem(tmp_path, diagnose_here):
    """For a library that no check is written for, `vgglab doctor` reported no problem, and training used the CPU."""
    reasons = '[("new", "torch_new finds no card"), ("cpu", None)]'
    code = f"import vgglab.devices\nvgglab.devices.availability = lambda _: iter({reasons})\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    code, findings = diagnose_here(tmp_path)
    assert (code, findings["facts"]["--device auto"]) == (1, "cpu")
    assert [item["problem"] for item in findings["problems"]] == ["torch_new finds no card"]


@needs_sim
def test_a_library_that_fails_to_autoload_is_reported(tmp_path, stubs):
    body = "raise OSError('libtopsrt.so: cannot open shared object file')"
    broken = fake_library(tmp_path, body, is_loaded_with_torch=True)
    code, findings = diagnose(broken, stubs)
    assert code == 1
    assert "libtopsrt.so" in all_text(findings)
    assert "LD_LIBRARY_PATH=/opt/tops/lib" in all_text(findings)
    assert findings["facts"]["torch"] is not None
    assert findings["auto"].startswith("error: ")
    args = ["python", "-m", "vgglab.train", "--device=gcu", "--data-path=digits", "--run-dir=run"]
    failed_run = shell(*args, env=environment(broken), cwd=tmp_path)
    assert (failed_run.returncode, len(failed_run.stderr.strip().splitlines())) == (2, 1)
    assert "torch cannot be imported" in failed_run.stderr
    assert "libtopsrt.so" in failed_run.stderr
    assert "vgglab.doctor" in failed_run.stderr
    # Training without the card still works.
    args = ["python", "-m", "vgglab.train", "--device=cpu", "--model=vgg11", "--epochs=1", "--run-dir=cpu"]
    short = ["--training-step-per-epoch=1", "--eval-step-per-epoch=1", "--workers=0"]
    assert shell(*args, *short, env=environment(broken), cwd=tmp_path).returncode == 0


@needs_sim
def test_the_library_of_another_vendor_is_reported_without_advice_for_gcu(tmp_path, diagnose_here):
    code, findings = diagnose_here(fake_library(tmp_path, "1 / 0", is_loaded_with_torch=True, name="torch_new"))
    assert (code, len(findings["problems"])) == (1, 1)
    assert "`import torch` fails to load the card's library" in all_text(findings)
    assert "/opt/tops/lib" not in all_text(findings)


def test_a_library_that_aborts_the_process_is_reported(tmp_path, diagnose_here):
    code, findings = diagnose_here(fake_library(tmp_path, "import os; os.abort()"))
    assert code == 1
    assert "the process exited abnormally (signal 6)" in all_text(findings)


def test_a_library_of_unknown_generation_is_reported(tmp_path, diagnose_here):
    folder = fake_library(tmp_path, "__version__ = '9'")
    code, findings = diagnose_here(folder)
    assert code == 1
    assert "unknown generation of torch_gcu" in all_text(findings)
    assert "unknown generation of torch_gcu" in train_on_gcu(tmp_path, folder).stderr


@needs_sim
def test_a_driver_that_does_not_respond_is_reported(diagnose_here):
    code, findings = diagnose_here(EAGER, VGGLAB_SIM_CARDS="0")
    assert code == 1
    assert findings["facts"]["driver"] == "no response"
    assert "finds no card" in all_text(findings)
    assert findings["auto"] != "gcu"


@needs_sim
def test_a_duplicate_card_and_a_capitalised_switch_are_reported(stubs):
    code, findings = diagnose(EAGER, stubs, TOPS_VISIBLE_DEVICES="0,0", TORCH_GCU_ENABLE_INT64_AND_UINT64="True")
    assert code == 1
    assert "names a card twice" in all_text(findings)
    assert "TORCH_GCU_ENABLE_INT64_AND_UINT64=True is read as false" in all_text(findings)


def test_a_variable_that_is_not_listed_is_checked_too(diagnose_here, monkeypatch):
    """A check of a variable that the list of relevant ones does not match used to find nothing, without a word."""
    monkeypatch.setattr("vgglab.devices.checkup.RELEVANT_VARIABLES", re.compile("^VGGLAB_"))
    code, findings = diagnose_here(TORCH_GCU_ENABLE_INT64_AND_UINT64="True", VGGLAB_SIM_CARDS="2")
    assert (code, findings["facts"]["variables"]["VGGLAB_SIM_CARDS"]) == (1, "2")
    assert "TORCH_GCU_ENABLE_INT64_AND_UINT64" not in findings["facts"]["variables"]
    assert "TORCH_GCU_ENABLE_INT64_AND_UINT64=True is read as false" in all_text(findings)


def test_the_lazy_generation_is_recognised(stubs):
    code, findings = diagnose(LAZY, stubs, CUDA_VISIBLE_DEVICES="")
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
def test_the_table_is_escaped(text):
    table = Diagnosis({"--device auto": text}, [{"problem": text, "fix": text}], [text])._repr_html_()
    assert table.count(html.escape(text)) == 4
    assert "<b>" not in table
