"""``make install`` with uv, with the uv that pip brings, and without; and the last line of ``make test``."""

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

# Write down how they were called; pip brings uv into .venv where it is allowed to.
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
SLOW = "uv is not available or failed: installing with pip, which takes a few minutes"


def executable(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def install(tmp_path):
    """``install("TORCH_INDEX=x", has_uv=True, ...)``: (what was called, stderr) of make install with nothing real."""
    for name, text in (("uv", FAKE_UV), ("pip", FAKE_PIP), ("python", FAKE_PYTHON)):
        executable(tmp_path / "fakes" / name, text)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    tools = tmp_path / "tools"  # what a recipe calls, so that no uv of this machine is on the PATH
    tools.mkdir()
    for name in ("sh", "make", "id", "sed", "head", "touch", "mkdir", "cp", "grep", "expand"):
        (tools / name).symlink_to(shutil.which(name))

    def make(*words: str, on_path: bool = False, **variables: str) -> tuple[list[str], str]:
        calls = tmp_path / "calls"
        environment = {"PATH": str(tools), "CALLS": str(calls), "FAKES": str(tmp_path / "fakes"), **variables}
        if on_path:
            executable(tmp_path / "bin" / "uv", FAKE_UV)
            environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{tools}"
        ended = shell("make", "install", f"PYTHON={tmp_path}/fakes/python", *words, cwd=tmp_path, env=environment)
        assert ended.returncode == 0, ended
        assert (tmp_path / ".venv" / ".installed").exists()
        return calls.read_text().splitlines(), ended.stderr

    return make


def test_the_uv_on_the_path_installs(install):
    calls, said = install(on_path=True)
    assert calls == [f"uv pip install --quiet --python .venv/bin/python {EDITABLE}", "from the default"]
    assert said == ""


def test_where_there_is_none_pip_brings_uv(install):
    calls, said = install(HAS_UV="yes")
    assert calls[0] == "pip install --quiet -c constraints.txt uv"
    assert calls[1:] == [f"uv pip install --quiet --python .venv/bin/python {EDITABLE}", "from the default"]
    assert said == ""


def test_where_uv_is_not_to_be_had_pip_installs_and_one_line_says_so(install):
    calls, said = install()
    assert calls[1:] == [f"pip install --quiet {EDITABLE}"]
    assert said == f"{SLOW}\n"


def test_where_uv_fails_pip_installs_and_one_line_says_so(install):
    calls, said = install(on_path=True, UV_EXIT="2")
    assert calls[-1] == f"pip install --quiet {EDITABLE}"
    assert said == f"{SLOW}\n"


def test_the_index_that_pip_is_configured_for_is_uvs_too(install):
    assert install(on_path=True, PIP_CONFIGURED="global.index-url='file:///mirror'")[0][1] == "from file:///mirror"


@pytest.mark.parametrize("on_path", [True, False], ids=["uv", "pip"])
def test_torch_index_is_for_torch_alone(install, on_path):
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
    """``make_run(TRAIN_EXIT="3")``: what make run ends with, the training and the notebook made up."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    executable(tmp_path / ".venv/bin/python", FAKE_TRAINING)
    (tmp_path / ".venv/.installed").touch()
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of make test's own
    return lambda **exits: shell("make", "run", cwd=tmp_path, env={**outside, **exits})


def test_make_run_ends_with_the_accuracy_and_the_commands_to_look_at_it(make_run, tmp_path):
    last = make_run().stdout.splitlines()[-1]
    run = next((tmp_path / "runs").iterdir()).name
    assert re.match(r"99\.44 % accuracy on the held-out digits, total time \d+ min \d\d s; run directory: ", last)
    assert f"; run directory: runs/{run}; to view it: .venv/bin/python -m vgglab.view.results runs/{run}; " in last
    assert last.endswith(f".venv/bin/python -m webbrowser file://{tmp_path}/build/run/00_start_here.html")


@pytest.mark.parametrize(
    ("exits", "said", "command"),
    [
        (
            {"TRAIN_EXIT": "3"},
            "the training failed",
            "vgglab.train --data-path digits .*--run-dir runs/.*--resume auto",
        ),
        ({"BOOK_EXIT": "1"}, "the notebook failed", "vgglab.book notebooks/00_start_here.ipynb --out build/run"),
    ],
)
def test_make_run_that_fails_names_the_command_that_repeats_it(make_run, exits, said, command):
    ended = make_run(**exits)
    line, makes_own = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert re.fullmatch(f"make run: .*{said}; to repeat only this step: .venv/bin/python -m {command}", line)
    assert makes_own.endswith(f"Error {next(iter(exits.values()))}")


def test_the_command_that_repeats_what_failed(monkeypatch, tmp_path):
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
    assert repeat_command(["t.py::a"], "long", "not door") == (
        "ATEN_CPU_CAPABILITY=default .venv/bin/python -m pytest -m long -k 'not door' t.py::a"
    )


def test_the_last_line_stands_below_pytests_own_and_the_exit_code_stays(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    words = [sys.executable, "-m", "pytest", "-p", "tests.last_line", "-p", "no:cacheprovider", "-n2", str(tmp_path)]
    ended = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)
    *_, closing, last = ended.stdout.splitlines()
    assert ended.returncode == 1
    assert "1 failed, 1 passed in " in closing
    assert last.startswith("1 failed, 1 passed after 0 min ")
    assert last.endswith("test_some.py::test_bad")


def test_after_success_the_last_line_has_what_to_do_next():
    line = LastLine().line({"passed": [1, 2], "skipped": [3]}, 0)
    assert line == "all 2 tests passed after 0 min 00 s (1 skipped); next: make lab opens the notebooks"
