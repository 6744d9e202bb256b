"""Two runs side by side: the same to the last bit, or where they part."""

import json
import shutil

import pytest
from conftest import shell

from vgglab import Run
from vgglab.runs.compare import as_text, compare_runs
from vgglab.view.figures import bands, curves_beside


@pytest.fixture
def runs(train):
    """``runs(*flags)``: a run of two epochs that writes about every step."""
    return lambda *flags: train("--seed=1", "--print-freq=1", "--epochs=2", *flags).run


def test_the_same_run_twice_is_the_same(runs):
    found = compare_runs(runs(), runs())
    assert found.is_same
    assert (found.settings, found.first, found.num_steps) == ({}, None, 8)
    assert "no difference in the 8 steps" in as_text(found)


@pytest.mark.parametrize(
    ("flags", "setting", "step", "figure"),
    [
        (["--lr=0.02"], "lr", 1, "lr"),
        # The first loss precedes the first change of weights; one of 0.1 % a step is far above float32's rounding.
        (["--weight-decay=10"], "weight_decay", 2, "loss"),
        (["--label-smoothing=0.1"], "label_smoothing", 1, "loss"),
        (["--lr-schedule=cosine"], "lr_schedule", 5, "lr"),  # the first epoch's rate is the same
        (["--seed=2"], "seed", 1, "loss"),
    ],
)
def test_one_deliberate_change_is_found_at_its_step(runs, flags, setting, step, figure):
    found = compare_runs(runs(), runs(*flags))
    assert list(found.settings) == [setting]
    assert (found.first.step, found.first.event, found.first.figure) == (step, "train", figure)
    assert not found.is_same


def test_a_setting_that_only_the_later_run_knows_is_seen(runs):
    older, newer = runs(), runs("--ema=0.9")
    settings = json.loads((older.path / "config.json").read_text())
    del settings["ema"]
    (older.path / "config.json").write_text(json.dumps(settings))
    assert compare_runs(older, newer).settings == {"ema": (None, 0.9)}


def test_other_data_are_said_before_the_first_step(runs, images, tmp_path):
    one = runs()
    for file in (images / "train" / "n01").glob("*"):
        file.unlink()
        break
    found = compare_runs(one, runs())
    assert found.starting_point == {"num_train_images": (18, 17)}


def test_a_tolerance_lets_rounding_pass(runs, tmp_path):
    """Losses off by a millionth, as other kernels may leave them; those of a second run could be off by nothing."""
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


def test_the_door(runs, tmp_path):
    one, other, further = runs(), runs("--lr=0.02"), runs("--epochs=3")
    words = ["python", "-m", "vgglab.compare"]
    same = shell(*words, one.path, one.path)
    assert (same.returncode, same.stderr) == (0, "")
    differs = shell(*words, one.path, other.path, "--json", f"--png={tmp_path / 'both.png'}")
    assert differs.returncode == 1
    assert "first difference: training step 1, lr" in differs.stdout
    assert json.loads(differs.stdout.splitlines()[-1])["first"]["figure"] == "lr"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    other_kind = shell(*words, one.path, other.path, f"--png={tmp_path / 'both.pdf'}")
    assert (other_kind.returncode, (tmp_path / "both.pdf").exists()) == (2, False)
    again = shell(*words, one.path, other.path, f"--png={tmp_path / 'both.png'}")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert shell(*words, one.path, further.path).returncode == 1
    rarely = runs("--print-freq=4")  # as often as it was asked to; the same training
    assert shell(*words, one.path, rarely.path).returncode == 0
    (rarely.path / "events.jsonl").write_text("")
    assert shell(*words, one.path, rarely.path).returncode == 2
    for wrong in ([one.path], [one.path, tmp_path / "nowhere"], [one.path, other.path, "--tolerance=-1"]):
        result = shell(*words, *wrong)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr


def test_a_run_is_compared_with_each_of_several(runs, tmp_path):
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


def test_two_tests_of_the_same_weights_are_the_same(runs, train):
    trained = runs()
    tests = [
        train("--test-only", f"--resume={trained.path}", *flags).run for flags in ((), (), ("--eval-step-per-epoch=1",))
    ]
    assert compare_runs(*tests[:2]).is_same
    assert shell("python", "-m", "vgglab.compare", *(run.path for run in tests[:2])).returncode == 0
    assert not compare_runs(*tests[1:]).is_same


def test_names_that_matplotlib_would_take_for_something_else_are_drawn(train):
    run = train("--print-freq=1").run
    figure = curves_beside([run, run], ["costs $5 and $_{", "_hidden"])
    figure.png()  # a name that is no formula raised an error here
    assert {text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()} == {
        "costs $5 and $_{",
        "_hidden",
    }
