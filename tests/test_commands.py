"""The ``vgglab`` command: its subcommands, help and shell completion, and the older ``python -m vgglab.<name>``."""

import argparse
import errno
import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import PROJECT, TINY
from processes import python

from vgglab.__main__ import NAMES
from vgglab.commands import call
from vgglab.settings.config import Request
from vgglab.settings.parser import SECTIONS

WIDE_TERMINAL = {**os.environ, "COLUMNS": "100"}
MAX_HELP_LINES = 45


def vgglab(*words, **options):
    return python("-m", "vgglab", *words, env=WIDE_TERMINAL, **options)


def test_no_command_prints_the_list_of_commands():
    result = vgglab()
    assert result.returncode == 0
    assert re.findall(r"^  ([a-z]+)  +", result.stdout, re.MULTILINE) == NAMES
    assert vgglab("--help").stdout == result.stdout
    assert vgglab("--version").stdout.startswith("vgglab ")


def test_unwritable_output_is_an_error_without_traceback(train):
    """A comparison whose output pipe was closed exited with 0, which means that the two runs are the same."""
    one, other = train().run.path, train("--lr=0.02").run.path
    command = shlex.join([sys.executable, "-m", "vgglab", "compare", str(one), str(other)])
    for words, code in (("| true; exit ${PIPESTATUS[0]}", 141), ("> /dev/full", 2), (">&-", 1), (" x 2> /dev/full", 2)):
        result = subprocess.run(["bash", "-c", f"{command} {words}"], capture_output=True, text=True, cwd=PROJECT)
        assert (result.returncode, "Traceback" in result.stderr) == (code, False), (words, result.stderr)
        assert result.stderr.count("\n") == (words == "> /dev/full")


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_usage_and_version_end_without_traceback_when_the_pipe_is_closed(flag):
    """``vgglab --help | head -5`` ended with the traceback of a BrokenPipeError."""
    command = shlex.join([sys.executable, "-m", "vgglab", flag])
    for words, code in ("| true; exit ${PIPESTATUS[0]}", 141), ("> /dev/full", 2):
        result = subprocess.run(["bash", "-c", f"{command} {words}"], capture_output=True, text=True, cwd=PROJECT)
        assert (result.returncode, "Traceback" in result.stderr) == (code, False), (words, result.stderr)


def test_os_error_unrelated_to_output_keeps_its_traceback(monkeypatch):
    """An error without a file name was treated as an output error, and its traceback was lost."""
    import vgglab.commands.plan

    def fail(argv):
        raise OSError(errno.EIO, "planted")

    monkeypatch.setattr(vgglab.commands.plan, "main", fail)
    with pytest.raises(OSError, match="planted"):
        call("plan", [])


def test_unknown_command_gives_a_one_line_error():
    result = vgglab("trian")
    assert (result.returncode, result.stderr) == (2, "vgglab: error: 'trian' is not a command; did you mean train?\n")
    assert "choose from notebooks, lab, " in vgglab("dance").stderr


@pytest.mark.parametrize("words", [*([name] for name in NAMES), ["bench", "data"], ["bench", "step"]], ids=" ".join)
def test_help_fits_on_one_screen(words):
    result = vgglab(*words, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: vgglab {words[0]}")
    assert len(result.stdout.splitlines()) <= MAX_HELP_LINES


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("notebooks", "lab")])
def test_python_m_prints_the_same_help(name):
    module = "vgglab.view.results" if name == "results" else f"vgglab.{name}"
    assert python("-m", module, "--help", env=WIDE_TERMINAL).stdout == vgglab(name, "--help").stdout
    result = python("-m", module, "--no-such-flag")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith(f"vgglab.{name}: error: ")


def test_help_all_lists_every_training_flag():
    help_text = vgglab("train", "--help-all").stdout
    missing = [item.name for item in fields(Request) if f"--{item.name.replace('_', '-')}" not in help_text]
    assert missing == []
    assert "--label-smoothing" not in vgglab("train", "--help").stdout
    assert {name for names in SECTIONS.values() for name in names.split()} < {item.name for item in fields(Request)}


def test_train_command_trains(images, tmp_path):
    result = vgglab("train", *TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report.json").exists()
    invalid = vgglab("train", "--epochs=0")
    assert invalid.returncode == 2
    assert invalid.stderr.startswith("vgglab.train: error: --epochs: ")


def test_notebooks_are_copied_and_nothing_is_overwritten(tmp_path):
    result = vgglab("notebooks", tmp_path / "here")
    assert result.returncode == 0, result.stderr
    copied = {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()}
    assert copied == {file.name: file.read_bytes() for file in PROJECT.glob("notebooks/[0-9]*.ipynb")}
    assert len(copied) == 9
    existing = tmp_path / "there" / "05_many_cards.ipynb"
    existing.parent.mkdir()
    existing.write_text("mine")
    result = vgglab("notebooks", tmp_path / "there")
    assert (result.returncode, result.stderr) == (
        2, f"vgglab.notebooks: error: {existing}: already exists; choose another folder\n",
    )  # fmt: skip
    assert [file.name for file in existing.parent.iterdir()] == [existing.name]


def test_wheel_includes_all_notebooks():
    """They are listed one by one, because the folder may also contain runs."""
    listed = re.findall(r'^"(notebooks/.*)" = "vgglab/\1"$', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed == sorted(str(file.relative_to(PROJECT)) for file in PROJECT.glob("notebooks/[0-9]*.ipynb"))


def completions(line, tmp_path):
    pytest.importorskip("argcomplete")
    output = tmp_path / "completions"
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(output),
        "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    code = "import sys; from vgglab.__main__ import main; sys.argv[:] = ['vgglab']; main()"
    python("-c", code, env=environment)
    return [word.strip() for word in output.read_text().split("\n")]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "train"])
def test_each_command_has_a_parser_for_shell_completion(name):
    parser = importlib.import_module(f"vgglab.commands.{name}").parser
    assert isinstance(parser, argparse.ArgumentParser)


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
@pytest.mark.parametrize(
    ("typed", "completion"),
    [
        ("vgglab do", "doctor"),
        ("vgglab train --label-sm", "--label-smoothing"),
        ("vgglab train --model vgg19_", "vgg19_bn"),
        ("vgglab bench st", "step"),
        ("vgglab plan --images-p", "--images-per-second"),
    ],
)
def test_shell_completion(typed, completion, tmp_path):
    assert completions(typed, tmp_path) == [completion]
