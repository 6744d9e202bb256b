"""Comparing runs: bit for bit equal, or where they first differ."""

import json
import shutil

import pytest
import torch
from conftest import shell

from vgglab import Run
from vgglab.commands import call
from vgglab.runs.compare import METRICS, as_text, compare_runs
from vgglab.trainer import Trainer
from vgglab.view.figures import bands, curves_beside


@pytest.fixture
def runs(train):
    """``runs(*flags)``: a run of two epochs that logs every step."""
    return lambda *flags: train("--seed=1", "--print-freq=1", "--epochs=2", *flags).run


def test_repeated_run_is_identical(runs):
    found = compare_runs(runs(), runs())
    assert found.is_same
    assert (found.settings, found.first, found.num_steps) == ({}, None, 8)
    assert "no difference in the 8 steps" in as_text(found)


@pytest.mark.parametrize(
    ("flags", "setting", "step", "metric"),
    [
        (["--lr=0.02"], "lr", 1, "lr"),
        # The first loss precedes the first update; a change of 0.1 % per step is far above float32 rounding.
        (["--weight-decay=10"], "weight_decay", 2, "loss"),
        (["--label-smoothing=0.1"], "label_smoothing", 1, "loss"),
        (["--lr-schedule=cosine"], "lr_schedule", 5, "lr"),  # the first epoch has the same learning rate
        (["--seed=2"], "seed", 1, "loss"),
    ],
)
def test_changed_setting_is_found_at_its_first_step(runs, flags, setting, step, metric):
    found = compare_runs(runs(), runs(*flags))
    assert list(found.settings) == [setting]
    assert (found.first.step, found.first.event, found.first.figure) == (step, "train", metric)
    assert not found.is_same


def test_scalars_of_a_step_can_be_compared(runs, monkeypatch):
    """``vgglab compare`` found no difference, because it looked for them among the fields of the event."""
    step = Trainer.step

    def run_with_norm(value):
        def step_with_norm(*args):
            result = step(*args)
            return result._replace(scalars={**result.scalars, "norm": torch.tensor(value)})

        monkeypatch.setattr(Trainer, "step", step_with_norm)
        return runs()

    monkeypatch.setitem(METRICS, "train", ("loss", "norm"))
    found = compare_runs(run_with_norm(2.0), run_with_norm(3.0))
    assert (found.first.figure, found.first.values) == ("norm", (2.0, 3.0))


def test_setting_missing_from_the_older_run_is_reported(runs):
    older, newer = runs(), runs("--ema=0.9")
    settings = json.loads((older.path / "config.json").read_text())
    del settings["ema"]
    (older.path / "config.json").write_text(json.dumps(settings))
    assert compare_runs(older, newer).settings == {"ema": (None, 0.9)}


def test_different_data_are_reported_as_starting_point(runs, images, tmp_path):
    one = runs()
    for file in (images / "train" / "n01").glob("*"):
        file.unlink()
        break
    found = compare_runs(one, runs())
    assert found.starting_point == {"num_train_images": (18, 17)}


def test_tolerance_accepts_rounding(runs, tmp_path):
    """Losses are changed by a millionth, as by other kernels; those of a second run might not differ at all."""
    one = runs()
    other = Run(shutil.copytree(one.path, tmp_path / "other"))
    lines = [json.loads(line) for line in (one.path / "events.jsonl").read_text().splitlines()]
    for line in lines:
        del line["check"], line["line"]  # as in runs of earlier versions
        if "loss" in line:
            line["loss"] *= 1 + 1e-6
    (other.path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not compare_runs(one, other).is_same
    assert compare_runs(one, other, tolerance=1e-5).first is None
    assert compare_runs(one, other, tolerance=1e-7).first.figure == "loss"


def test_command_line(runs, tmp_path, capsys):
    """The command is called here, without a new interpreter each time, except once."""

    def compare(*words):
        capsys.readouterr()
        code = call("compare", [str(word) for word in words])
        return code, *capsys.readouterr()

    one, other, longer = runs(), runs("--lr=0.02"), runs("--epochs=3")
    same = shell("python", "-m", "vgglab.compare", one.path, one.path)
    assert (same.returncode, same.stderr) == (0, "")
    code, out, _ = compare(one.path, other.path, "--json", f"--png={tmp_path / 'both.png'}")
    assert code == 1
    assert "first difference: training step 1, lr" in out
    assert json.loads(out.splitlines()[-1])["first"]["figure"] == "lr"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    code, _, _ = compare(one.path, other.path, f"--png={tmp_path / 'both.pdf'}")
    assert (code, (tmp_path / "both.pdf").exists()) == (2, False)
    code, _, err = compare(one.path, other.path, f"--png={tmp_path / 'both.png'}")
    assert (code, err.count("\n")) == (2, 1)
    assert compare(one.path, longer.path)[0] == 1
    sparse = runs("--print-freq=4")  # logged less often, but the same training
    assert compare(one.path, sparse.path)[0] == 0
    (sparse.path / "events.jsonl").write_text("")
    assert compare(one.path, sparse.path)[0] == 2
    for invalid in ([one.path], [one.path, tmp_path / "nowhere"], [one.path, other.path, "--tolerance=-1"]):
        code, _, err = compare(*invalid)
        assert (code, err.count("\n")) == (2, 1), err


def test_one_run_is_compared_with_several(runs, tmp_path):
    one, other, same = runs(), runs("--lr=0.02"), runs()
    words = [one.path, other.path, same.path]
    result = shell("python", "-m", "vgglab.compare", *words, "--json", f"--png={tmp_path / 'all.png'}")
    assert result.returncode == 1
    assert [found["is_same"] for found in json.loads(result.stdout.splitlines()[-1])] == [False, True]
    assert f"{one.name} and {other.name}\n" in result.stdout
    assert (tmp_path / "all.png").stat().st_size > 5000


def test_bands_and_curves_are_drawn(runs):
    one, other = runs(), runs("--seed=2")
    assert len(curves_beside([one, other], first_difference=1).png()) > 5000
    figure = bands({"a": [one, other], "b": [other]})
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["a, n = 2", "b, n = 1"]
    mean = figure.axes[0].lines[0].get_ydata()[0]
    assert mean == pytest.approx((one.events("train")[0]["loss"] + other.events("train")[0]["loss"]) / 2)


def test_evaluations_of_the_same_weights_are_identical(runs, train):
    trained = runs()
    evaluations = [
        train("--test-only", f"--resume={trained.path}", *flags).run for flags in ((), (), ("--eval-step-per-epoch=1",))
    ]
    assert compare_runs(*evaluations[:2]).is_same
    assert shell("python", "-m", "vgglab.compare", *(run.path for run in evaluations[:2])).returncode == 0
    assert not compare_runs(*evaluations[1:]).is_same


def test_names_with_matplotlib_markup_are_drawn_literally(train):
    run = train("--print-freq=1").run
    names = ("costs $5 and $_{", "_hidden")
    figure = curves_beside([Run(shutil.copytree(run.path, run.path.with_name(name))) for name in names])
    figure.png()  # a name that is not a valid formula raised an error here
    assert {text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()} == {*names}
