"""``vgglab plan``: compared with numbers computed here, and with what a run does."""

import json

import pytest
from processes import python

from vgglab.commands import call
from vgglab.errors import UserError
from vgglab.lab.plan import plan_training
from vgglab.settings.parser import flags_given, parse_flags


def make_plan(*flags, speed=590.3, **options):
    return plan_training(parse_flags(flags), speed, given=flags_given(flags), **options)


def test_seed_recipe_on_eight_cards():
    """ImageNet's 1,281,167 images, 192 per card; VGG16's 138,357,544 parameters, each with its momentum."""
    found = make_plan("--recipe=seed", ranks=8)
    steps_per_epoch = 1_281_167 // 1536
    assert (found.steps_per_epoch, found.steps) == (steps_per_epoch, 90 * steps_per_epoch)
    assert found.training_seconds == pytest.approx(90 * steps_per_epoch * 1536 / (8 * 590.3))
    assert found.evaluation_seconds == pytest.approx(90 * 50_000 / 3 / (8 * 590.3))
    assert found.checkpoint_bytes == 2 * 4 * 138_357_544
    assert found.num_checkpoints == 90
    base = 0.01 * 1536 / 256
    expected = [(epoch, base * (epoch + 1) / 5) for epoch in range(5)]
    expected += [(30, base / 10), (60, base / 100), (80, base / 1000)]
    assert [epoch for epoch, _ in found.rates] == [epoch for epoch, _ in expected]
    assert [rate for _, rate in found.rates] == pytest.approx([rate for _, rate in expected])


def test_run_matches_its_plan(images, train):
    flags = (
        "--model=vgg11_bn",
        "--epochs=3",
        "--eval-freq=2",
        "--checkpoint-every=3",
        "--ema=0.9",
        "--lr-schedule=cosine",
    )
    run = train(*flags, "--print-freq=1", "--seed=1").run
    found = make_plan(*flags, "--image-size=32", "--batch-size=4", "--warmup=0", f"--data-path={images}")
    events = run.events("train")
    assert found.steps == events[-1]["step"]
    assert found.num_checkpoints == len(run.events("checkpoint"))
    first_of_epoch = {event["epoch"]: event["lr"] for event in reversed(events)}
    assert dict(found.rates) == pytest.approx(first_of_epoch)
    size = run.checkpoint("last").stat().st_size
    assert found.checkpoint_bytes == pytest.approx(size, rel=0.01)


def test_head_and_start_epoch_change_the_plan():
    found = make_plan("--recipe=seed", "--head=small", "--start-epoch=80")
    assert (found.epochs, found.steps) == (10, 10 * (1_281_167 // 192))
    num_parameters = 14_714_688 + 2 * (512 * 512 + 512) + 513 * 1000  # convolutions and the small classifier
    assert found.checkpoint_bytes == 2 * 4 * num_parameters


@pytest.mark.parametrize("flags", [["--seeds=5"], ["--test-only", "--pretrained"], ["--resume=auto"]])
def test_only_a_single_run_from_scratch_can_be_planned(flags):
    with pytest.raises(UserError, match="leave them out"):
        make_plan("--recipe=quick", *flags)


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (["--recipe=seed", "--epochs=3"], {}, "ends during the warm-up"),
        (["--recipe=seed"], {"ranks": 64}, "8 x that of --recipe seed"),
        (["--recipe=modern", "--model=vgg16", "--batch-size=512"], {}, "unlikely to learn at a learning rate of 0.2"),
        (["--recipe=paper", "--init=normal"], {}, "does not learn from initial weights this small"),
        (["--recipe=paper"], {}, "cannot be planned"),
        (["--recipe=seed", "--rmsprop-eps=0.1"], {}, "--rmsprop-eps has no effect with --optimizer sgd"),
    ],
)
def test_plan_warns(flags, options, message):
    assert any(message in text for text in make_plan(*flags, **options).warnings)


def test_recipes_give_no_warnings():
    assert make_plan("--recipe=seed", "--workers=1", ranks=8).warnings == []
    assert make_plan("--recipe=modern").warnings == []


def test_batch_larger_than_the_training_set_is_rejected(images):
    with pytest.raises(UserError, match="larger than the training set"):
        make_plan(f"--data-path={images}", "--batch-size=192")


def test_command_line(train, images, capsys):
    run = train("--epochs=3", "--skip-steps=1", "--print-freq=1").run
    tiny = ["--recipe=quick", f"--data-path={images}", "--batch-size=8"]
    assert call("plan", [*tiny, f"--run={run.path}", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert {"training_seconds", "steps", "checkpoint_bytes"} <= set(found)
    assert found["images_per_second"] == pytest.approx(run.report()["images_per_second"])
    assert "checkpoints" in out
    assert "its speed was measured with model vgg11, batch size 4" in out
    with_ranks = make_plan("--recipe=seed", "--world-size=8", ranks=8)
    for flag in "--world-size=8", "--nproc=8", "--ranks=8":  # --nproc was ignored: the plan was for one card
        assert call("plan", ["--recipe=seed", flag, "--images-per-second=590.3", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == with_ranks.steps
    assert call("plan", [*tiny, f"--run={run.path}", "--images-per-second=5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    result = python("-m", "vgglab.plan", "--recipe", "seed", "--images_per_second", "590", "--ranks", "8")
    assert (result.returncode, result.stderr) == (0, "")
    for invalid in ([], ["--images-per-second=0"], ["--images-per-second=5", "--recipe=best"], ["--run=nowhere"]):
        assert call("plan", [*tiny, *invalid]) == 2
        assert capsys.readouterr().err.count("\n") == 1
