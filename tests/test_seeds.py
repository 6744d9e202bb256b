"""Several seeds: started from the shell and from Python, stopped, failing, and summarised in a table."""

import os
import signal
import statistics
import subprocess
import sys

import pytest
from conftest import MAX_WAIT_SECONDS, TINY, shell, wait_until
from processes import PYTHONPATH
from test_launch import MARK, processes_with

import vgglab
from vgglab.view import results
from vgglab.view.seeds_table import seeds_table

pytestmark = pytest.mark.usefixtures("narrow", "forked")


@pytest.fixture
def tiny(images, tmp_path):
    return [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--print-freq=1"]


def seeds_in(path):
    return [run.config["seed"] for run in vgglab.Seeds(path).runs]


def test_command_runs_seeds_one_by_one_and_prints_a_table(tiny, tmp_path):
    result = shell("python", "-m", "vgglab.train", *tiny, "--seeds", "3", "--seed=7", f"--run-dir={tmp_path / 'three'}")
    assert result.returncode == 0, result.stderr
    runs = vgglab.Seeds(tmp_path / "three").runs
    assert [run.config["seed"] for run in runs] == [7, 8, 9]
    accuracies = [run.events("eval")[-1]["acc1"] for run in runs]
    [row] = [row for row in seeds_table({"x": runs}).rows if row[1] == "last top-1 %"]
    statistic = [statistics.mean(accuracies), statistics.stdev(accuracies), min(accuracies), max(accuracies)]
    assert row[2] == "3"
    assert [float(cell) for cell in row[3:]] == pytest.approx(statistic, rel=5e-3)  # three digits or more
    assert "fewer than 5 seeds" in result.stdout
    assert len({run.events("train")[0]["loss"] for run in runs}) == 3
    assert len(results.collect([tmp_path])) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--seeds=0"],
        ["--seeds=a"],
        ["--seeds=1,1"],
        ["--seeds=1,2", "--seed=1"],
        ["--seeds=2", "--fix-seed"],
        ["--seeds=3", "--seed=4294967294"],
        ["--seeds=2", "--resume=auto"],  # which series?
        ["--seeds=2", "--resume=runs/x", "--run-dir=x"],
    ],
)
def test_invalid_seeds_are_rejected(refused, flags):
    assert refused(*flags).startswith("--seeds")


def test_series_stops_at_the_first_failure(tiny, tmp_path):
    words = ["python", "-m", "vgglab.train", *tiny, "--seeds=1,2", "--num-classes=7", f"--run-dir={tmp_path / 'none'}"]
    result = shell(*words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert not list(tmp_path.glob("none/*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_signal_to_the_series_ends_its_run(tiny, tmp_path, number, code):
    mark = f"series-{number}"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, MARK: mark}
    words = [
        sys.executable,
        "-m",
        "vgglab.train",
        *tiny,
        "--seeds=2",
        "--epochs=100000",
        f"--run-dir={tmp_path / 'long'}",
    ]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "long" / "seed-1"
    # The folder exists before the files that make it a run.
    wait_until(lambda: (first / "events.jsonl").exists() and vgglab.Run(first).events("train"))
    process.send_signal(number)
    assert process.wait(MAX_WAIT_SECONDS) == code
    wait_until(lambda: not processes_with(mark))
    assert seeds_in(tmp_path / "long") == [1]  # the second was not started
    if number != signal.SIGKILL:
        [run] = vgglab.Seeds(tmp_path / "long").runs
        assert run.status == "interrupted"
        last_line = process.stderr.read().splitlines()[-1]
        assert last_line.endswith(f"run the same command with --run-dir {tmp_path / 'long'}")
    if number == signal.SIGTERM:  # the same command resumes it and repeats nothing
        step = run.events("train")[-1]["step"]
        epochs = f"--epochs={step // 4 + 2}"
        result = shell("python", *words[1:], epochs, "--resume=auto", env=environment)
        assert result.returncode == 0, result.stderr
        assert seeds_in(tmp_path / "long") == [1, 2]
        assert vgglab.Seeds(tmp_path / "long").runs[0].events("start")[-1]["first_step"] >= step
        again = shell("python", *words[1:], epochs, env=environment)
        assert again.stdout.count("already done") == 2


def test_launch_from_a_script(tiny, tmp_path, capsys):
    seeds = vgglab.launch(tiny, seeds="4,2", run_dir=tmp_path / "two", nproc=2, batch_size=2)
    assert seeds.is_over
    assert seeds_in(tmp_path / "two") == [2, 4]
    assert all(run.env["world_size"] == 2 for run in seeds.runs)
    assert "last top-1 %" in capsys.readouterr().out
    assert len(seeds.curves().png()) > 5000
    assert "<table>" in seeds._repr_html_()
    assert repr(vgglab.Seeds(tmp_path / "two")) == repr(seeds_table({"two": seeds.runs}))


def test_stop_ends_the_run_and_starts_no_other(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, "stopped-seeds")
    seeds = vgglab.launch(tiny, seeds=3, epochs=100_000, run_dir=tmp_path / "stopped", watch=False)
    wait_until(lambda: seeds.runs and seeds.runs[0].events("train"))
    seeds.stop()
    assert processes_with("stopped-seeds") == []
    assert [run.status for run in seeds.runs] == ["interrupted"]
    assert seeds.wait() is seeds


@pytest.mark.new_interpreters
def test_stop_ends_a_run_that_is_just_starting(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, "stopped-early")
    seeds = vgglab.launch(tiny, seeds=2, epochs=100_000, run_dir=tmp_path / "early", watch=False)
    seeds.stop()
    assert processes_with("stopped-early") == []
    assert seeds.is_over


def test_failure_is_raised_by_launch(tiny, tmp_path):
    with pytest.raises(vgglab.UserError, match="--num-classes 7"):
        vgglab.launch(tiny, seeds=2, num_classes=7, run_dir=tmp_path / "failed")
    with pytest.raises(vgglab.UserError, match="contains no run in a folder named seed-<n>"):
        vgglab.Seeds(tmp_path / "nowhere")
    with pytest.raises(vgglab.UserError, match="cannot be combined with nnodes or detach"):
        vgglab.launch(tiny, seeds=2, detach=True)


def test_ranks_of_torchrun_refuse_several_seeds_and_name_the_flag_that_works(refused, monkeypatch):
    """The message named only ``vgglab.launch``, although ``--nproc`` works with ``--seeds``."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "--nproc" in refused("--seeds=2")
