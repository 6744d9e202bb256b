"""%load_ext vgglab, in a shell as a notebook has one."""

import os
import re
import time

import pytest
from conftest import PATIENCE_SECONDS, TINY, wait_until

import vgglab

interactive = pytest.importorskip("IPython.core.interactiveshell")
traitlets = pytest.importorskip("traitlets.config")
completer = pytest.importorskip("IPython.core.completer")
capture = pytest.importorskip("IPython.utils.capture")


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """IPython in an empty folder; with a kernel, as far as the front end is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VGGLAB_UI", "static")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    interactive.InteractiveShell.clear_instance()
    settings = traitlets.Config()
    settings.HistoryAccessor.enabled = False  # a database in a folder that is gone when this process ends
    one = interactive.InteractiveShell.instance(config=settings)
    one.kernel = object()
    one.run_line_magic("load_ext", "vgglab")
    yield one
    interactive.InteractiveShell.clear_instance()


@pytest.fixture
def flags(images):
    return " ".join([*TINY, f"--data-path={images}"])


def typed(shell, line):
    """What TAB offers at the end of the line."""
    with completer.provisionalcompleter():
        return [found.text for found in shell.Completer.completions(line, len(line))]


def said(shell, cell):
    """What a cell that fails prints."""
    with capture.capture_output() as output:
        result = shell.run_cell(cell)
    assert not result.success
    return output.stdout + output.stderr


def test_a_run_without_an_audience_blocks_and_leaves_one_block(shell, flags):
    with capture.capture_output() as output:
        result = shell.run_cell(f"%vgglab run {flags} --epochs {{1 + 1}} --print_freq 1")
    assert result.success, output.stdout
    assert result.result is None
    run = shell.user_ns["run"]
    assert (run.status, run.config["epochs"], run.process.poll()) == ("done", 2, 0)
    shown = {}
    for part in output.outputs:
        shown[part.transient["display_id"]] = part.data
    line, picture = shown.values()  # each updated in place
    assert "done" in line["text/plain"]
    assert picture["image/png"]

    table = shell.run_cell("%vgglab runs").result
    assert [found.path for found in table] == [run.path]
    assert re.search(rf"{run.name} +done +vgg11 +cpu +2 ", repr(table))
    assert f"<td>{run.name}</td>" in table._repr_html_()
    assert typed(shell, "%vgglab watch ") == [run.name]
    assert run.name not in typed(shell, "%vgglab stop ")


def test_runs_are_listed_newest_last_and_simulated_ones_are_marked(shell, train, tmp_path):
    train("--print-freq=1", f"--run-dir={tmp_path}/runs/z-first")
    time.sleep(0.05)
    second = tmp_path / "runs" / "a-second"
    train("--print-freq=1", f"--run-dir={second}")
    env = (second / "env.json").read_text()
    assert '"simulated": false' in env
    (second / "env.json").write_text(env.replace('"simulated": false', '"simulated": true'))
    *_, first, last = repr(shell.run_cell("%vgglab runs").result).strip().splitlines()
    assert re.search("z-first +done .* cpu +1 ", first)
    assert re.search(r"a-second +done.* cpu \(simulated\) +1 +[0-9.]+$", last)  # no speed
    assert repr(shell.run_cell(f"%vgglab runs {second}").result).strip().endswith(last.strip())


def test_stop_ends_the_newest_that_is_running(shell, flags):
    shell.run_cell("import vgglab")
    argv = [*flags.split(), "--epochs=1000"]
    older = vgglab.launch(argv, watch=False, run_dir="runs/older")
    time.sleep(0.05)
    newer = vgglab.launch(argv, watch=False, run_dir="runs/newer")
    try:
        for run in (older, newer):
            wait_until(lambda run=run: run.events("checkpoint"))
        assert {"older", "newer"} <= set(typed(shell, "%vgglab stop "))
        assert "matches 2 runs, such as older, newer" in said(shell, "%vgglab stop er")
        with capture.capture_output() as output:
            assert shell.run_cell("%vgglab stop").success
        assert output.stdout.strip() == "newer: interrupted"
        newer.process.wait(PATIENCE_SECONDS)
        with pytest.raises(ProcessLookupError):
            os.kill(newer.process.pid, 0)
        assert older.status == "running"
        with capture.capture_output():
            assert shell.run_cell("%vgglab stop old").success
        assert older.process.wait(PATIENCE_SECONDS) is not None
        assert older.status == "interrupted"
    finally:
        older.stop()
        newer.stop()
    assert said(shell, "%vgglab stop").strip().endswith("no run is active; name one (%vgglab runs lists them)")


def test_stop_ends_a_series_of_seeds(shell, flags, monkeypatch):
    monkeypatch.setattr("vgglab.runs.seeds.LaunchedSeeds.watch", lambda series: None)  # as a live notebook: at once
    assert shell.run_cell(f"%vgglab run {flags} --epochs 1000 --seeds 3,4").success
    series = shell.user_ns["run"]
    try:
        wait_until(lambda: series.current and series.current.events("train"))
        assert shell.run_cell("%vgglab stop seed-3").success
        assert series.is_over
        assert [run.status for run in series.runs] == ["interrupted"]
    finally:
        series.stop()


def test_tab(shell):
    assert typed(shell, "%vgglab r") == ["run", "runs"]
    assert typed(shell, "%vgglab run --mo") == ["--model", "--momentum"]
    models = ["vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]
    assert typed(shell, "%vgglab run --model vgg1") == models
    assert typed(shell, "%vgglab run --model=vgg11") == ["vgg11", "vgg11_bn"]
    assert typed(shell, "%vgglab run --data-p") == ["--data-path"]
    assert typed(shell, "%vgglab run --epochs 2 --data_p") == ["--data_path"]
    assert typed(shell, "%vgglab run --data_path dig") == ["digits"]
    assert typed(shell, "%vgglab run --npr") == ["--nproc"]


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        ("%vgglab run --modle vgg11", "UserError: --modle: no such flag; did you mean --model?"),
        ("%vgglab run --nproc 0", "UserError: --nproc: '0' is not a whole number, 1 or more"),
        ("%vgglab rnu", "UserError: %vgglab rnu: no such subcommand; choose from run, runs, watch, stop"),
        ("%vgglab runs", "UserError: %vgglab runs: runs: no such folder; %vgglab run makes ./runs"),
        ("%vgglab watch it", "UserError: %vgglab watch it: no such run; %vgglab runs lists them"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(shell, cell, line, tmp_path):
    assert said(shell, cell).strip() == line
    assert not (tmp_path / "runs").exists()


def test_help(shell, capsys):
    for text in (shell.object_inspect_text("%vgglab"), _printed(shell, capsys, "%vgglab")):
        assert "%vgglab stop [run]" in text
    assert "--label-smoothing" in _printed(shell, capsys, "%vgglab run --help")


def _printed(shell, capsys, cell):
    capsys.readouterr()
    assert shell.run_cell(cell).success
    return capsys.readouterr().out
