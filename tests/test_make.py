"""``make install`` with uv, with uv installed by pip, and without uv; ``make run``; the last line of ``make test``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, shell
from last_line import LastLine, repeat_command

# They record how they were called; with HAS_UV, the fake pip installs the fake uv into .venv.
FAKE_UV = """#!/bin/sh
echo "uv $*" >> "$CALLS"
echo "from ${UV_DEFAULT_INDEX:-the default}" >> "$CALLS"
exit ${UV_EXIT:-0}
"""
FAKE_PIP = """#!/bin/sh
[ "$1" = config ] && { echo "global.extra-index-url='file:///extra'"; echo "$PIP_CONFIGURED"; exit; }
echo "pip $*" >> "$CALLS"
case "$*" in *" uv") [ -n "$HAS_UV" ] || { echo "no such package" >&2; exit 1; }; cp "$FAKES/uv" .venv/bin/uv ;; esac
"""
FAKE_PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit
[ "$2" = venv ] && { mkdir -p .venv/bin; cp "$FAKES/pip" "$FAKES/python" .venv/bin; }
exit 0
"""
EDITABLE = "-c constraints.txt -e .[dev]"
FALLBACK_MESSAGE = "uv is not available or failed: installing with pip, which takes a few minutes"


def write_executable(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def install(tmp_path):
    """``install("TORCH_INDEX=x", on_path=True, ...)``: run make install with fakes; (recorded calls, stderr)."""
    for name, text in (("uv", FAKE_UV), ("pip", FAKE_PIP), ("python", FAKE_PYTHON)):
        write_executable(tmp_path / "fakes" / name, text)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    tools = tmp_path / "tools"  # the commands that the Makefile needs, to keep this machine's uv off the PATH
    tools.mkdir()
    for name in ("sh", "make", "id", "sed", "head", "touch", "mkdir", "cp", "grep", "expand"):
        (tools / name).symlink_to(shutil.which(name))

    def make(*words: str, on_path: bool = False, **variables: str) -> tuple[list[str], str]:
        calls = tmp_path / "calls"
        environment = {"PATH": str(tools), "CALLS": str(calls), "FAKES": str(tmp_path / "fakes"), **variables}
        if on_path:
            write_executable(tmp_path / "bin" / "uv", FAKE_UV)
            environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{tools}"
        result = shell("make", "install", f"PYTHON={tmp_path}/fakes/python", *words, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result
        assert (tmp_path / ".venv" / ".installed").exists()
        return calls.read_text().splitlines(), result.stderr

    return make


def test_install_uses_uv_on_the_path(install):
    calls, stderr = install(on_path=True)
    assert calls == [f"uv pip install --quiet --python .venv/bin/python {EDITABLE}", "from the default"]
    assert stderr == ""


def test_install_gets_missing_uv_with_pip(install):
    calls, stderr = install(HAS_UV="yes")
    assert calls[0] == "pip install --quiet -c constraints.txt uv"
    assert calls[1:] == [f"uv pip install --quiet --python .venv/bin/python {EDITABLE}", "from the default"]
    assert stderr == ""


def test_install_falls_back_to_pip_without_uv(install):
    calls, stderr = install()
    assert calls[1:] == [f"pip install --quiet {EDITABLE}"]
    assert stderr == f"{FALLBACK_MESSAGE}\n"


def test_install_falls_back_to_pip_if_uv_fails(install):
    calls, stderr = install(on_path=True, UV_EXIT="2")
    assert calls[-1] == f"pip install --quiet {EDITABLE}"
    assert stderr == f"{FALLBACK_MESSAGE}\n"


def test_uv_uses_the_index_configured_for_pip(install):
    assert install(on_path=True, PIP_CONFIGURED="global.index-url='file:///mirror'")[0][1] == "from file:///mirror"


@pytest.mark.parametrize("on_path", [True, False], ids=["uv", "pip"])
def test_torch_index_applies_only_to_torch(install, on_path):
    calls, _ = install("TORCH_INDEX=file:///cpu", on_path=on_path)
    first, last = (call for call in calls if "install" in call and not call.endswith(" uv"))
    option = "--default-index" if on_path else "--index-url"
    assert first.endswith(f"-c constraints.txt {option} file:///cpu --no-deps torch torchvision")
    assert "file:///cpu" not in last
    assert last.endswith(EDITABLE)


FAKE_TRAINING = """#!/bin/sh
case "$*" in
*vgglab.train*) run=$(echo "$*" | sed 's/.*--run-dir \\([^ ]*\\).*/\\1/'); mkdir -p "$run"
    printf '{\\n  "model": "vgg16_bn",\\n  "acc1": 99.4444,\\n  "acc5": 100.0\\n}\\n' > "$run/report.json"
    exit ${TRAIN_EXIT:-0} ;;
*vgglab.book*) exit ${BOOK_EXIT:-0} ;;
esac
"""


@pytest.fixture
def make_run(tmp_path):
    """``make_run(TRAIN_EXIT="3")``: the result of make run with a fake training run and notebook."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    write_executable(tmp_path / ".venv/bin/python", FAKE_TRAINING)
    (tmp_path / ".venv/.installed").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # set by make test
    return lambda **exits: shell("make", "run", cwd=tmp_path, env={**environment, **exits})


def test_make_run_prints_accuracy_and_commands_to_view_it(make_run, tmp_path):
    last = make_run().stdout.splitlines()[-1]
    run = next((tmp_path / "runs").iterdir()).name
    assert re.match(r"99\.44 % accuracy on the held-out digits, total time \d+ min \d\d s; run directory: ", last)
    assert f"; run directory: runs/{run}; to view it: .venv/bin/python -m vgglab.view.results runs/{run}; " in last
    assert last.endswith(f".venv/bin/python -m webbrowser file://{tmp_path}/build/run/00_start_here.html")


@pytest.mark.parametrize(
    ("exits", "message", "command"),
    [
        (
            {"TRAIN_EXIT": "3"},
            "the training failed",
            "vgglab.train --data-path digits .*--run-dir runs/.*--resume auto",
        ),
        ({"BOOK_EXIT": "1"}, "the notebook failed", "vgglab.book notebooks/00_start_here.ipynb --out build/run"),
    ],
)
def test_failed_make_run_prints_the_command_to_repeat_it(make_run, exits, message, command):
    result = make_run(**exits)
    line, make_error = result.stderr.splitlines()
    assert result.returncode == 2
    assert re.fullmatch(f"make run: .*{message}; to repeat only this step: .venv/bin/python -m {command}", line)
    assert make_error.endswith(f"Error {next(iter(exits.values()))}")


def test_repeat_command_for_failed_tests(monkeypatch, tmp_path):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert repeat_command(["tests/test_a.py::test[a b]@browser", "tests/test_a.py::test[c@d]"]) == (
        ".venv/bin/python -m pytest 'tests/test_a.py::test[a b]' 'tests/test_a.py::test[c@d]'"
    )
    many = [f"tests/test_{file}.py::test_{i}" for file in "ab" for i in range(3)]
    assert repeat_command(many) == ".venv/bin/python -m pytest tests/test_a.py tests/test_b.py"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert repeat_command(["t.py::a"], "long", "not slow") == (
        "ATEN_CPU_CAPABILITY=default .venv/bin/python -m pytest -m long -k 'not slow' t.py::a"
    )


def test_last_line_follows_pytests_summary_and_keeps_exit_code(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    words = [sys.executable, "-m", "pytest", "-p", "tests.last_line", "-p", "no:cacheprovider", "-n2", str(tmp_path)]
    result = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)
    *_, summary, last = result.stdout.splitlines()
    assert result.returncode == 1
    assert "1 failed, 1 passed in " in summary
    assert last.startswith("1 failed, 1 passed after 0 min ")
    assert last.endswith("test_some.py::test_bad")


def test_last_line_after_success_names_the_next_step():
    line = LastLine().line({"passed": [1, 2], "skipped": [3]}, 0)
    assert line == "all 2 tests passed after 0 min 00 s (1 skipped); next: make lab opens the notebooks"
