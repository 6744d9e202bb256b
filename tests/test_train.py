"""python -m vgglab.train: the files that it writes, the input that it refuses, and resuming."""

import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import CLASSES, MAX_WAIT_SECONDS, NUM_VAL, PROJECT, TINY, shell, wait_until
from processes import python, ranks

import vgglab
from vgglab import Run
from vgglab.devices.compat import load_tensors
from vgglab.errors import UserError
from vgglab.optim import OPTIMIZERS, OptimizerSpec
from vgglab.runs import checkpoint
from vgglab.runs.report import build_report
from vgglab.runs.writer import RunWriter
from vgglab.settings.config import Request
from vgglab.trainer import Trainer

ORIGINAL_REPORT_FIELDS = (
    "model local_rank batch_size epochs training_step_per_epoch eval_step_per_epoch acc1 acc5 device skip_steps "
    "train_fps_mean train_fps_min train_fps_max training_time"
).split()


def losses(run):
    return [event["loss"] for event in run.events("train")]


def test_run_writes_all_documented_files(train):
    result = train("--epochs=2", "--print-freq=1", "--skip-steps=2")
    assert result.code == 0
    run = result.run
    assert run.status == "done"
    written = {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}
    assert written == {
        "config.json", "env.json", "events.jsonl", "report.json", "log/rank0.txt", "log/rank0.jsonl",
        "lock", "checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt",
    }  # fmt: skip
    events = run.events()
    assert (events[0]["event"], events[0]["schema"]) == ("start", 1)
    assert [event["step"] for event in run.events("train")] == list(range(1, 9))
    assert [(e["epoch"], e["num_images"]) for e in run.events("eval")] == [(0, 3 * NUM_VAL), (1, 3 * NUM_VAL)]
    assert events[-1]["event"] == "end"
    assert run.config["num_classes"] == 3  # the resolved value, not the flag's
    assert run.env["simulated"] is False
    assert run.env["world_size"] == 1
    assert torch.__version__.startswith(run.env["versions"]["torch"])
    # A version of the decoder may change pixels.
    assert ("simplejpeg" in run.env["versions"]) == (find_spec("simplejpeg") is not None)
    assert "held-out images" in run.logs()
    assert run.logs() in result.out


def test_tensorboard_has_the_original_scalars(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("--print-freq=1", "--tensorboard").run
    logged = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for name in ("learning_rate", "loss", "train_accuracy_step", "train_fps_step", "eval_accuracy_epoch"):
        assert logged.Scalars(name), name
    assert [s.value for s in logged.Scalars("loss")] == pytest.approx(losses(run))


def test_scalars_that_a_step_adds_are_logged_and_reported(train, monkeypatch):
    step = Trainer.step

    def step_with_scalars(*args):
        result = step(*args)
        added = {"norm": torch.tensor(2.0), "overflow": torch.tensor(math.inf)}
        return result._replace(scalars={**result.scalars, **added})

    monkeypatch.setattr(Trainer, "step", step_with_scalars)
    run = train("--print-freq=1").run
    expected = {"norm": 2.0, "overflow": None}
    assert [event["scalars"] for event in run.events("train")] == 4 * [expected]
    assert run.report()["scalars"] == build_report(run, recompute=True)["scalars"] == expected
    assert run.damage() == []


def test_time_for_saving_a_checkpoint_belongs_to_no_step(train, monkeypatch):
    clock, save, hours = time.perf_counter, RunWriter.save_checkpoint, []

    def save_for_an_hour(*args):
        save(*args)
        hours.append(1)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * len(hours))
    monkeypatch.setattr(RunWriter, "save_checkpoint", save_for_an_hour)
    events = train("--print-freq=1", "--checkpoint-every=1").run.events("train")
    assert len(hours) > len(events) - 1 > 0
    assert max(max(event["interval_seconds"], *event["step_seconds"]) for event in events) < 3600


def test_tensorboard_flag_without_the_package_is_an_error(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "--tensorboard: the package tensorboard is missing" in refused("--tensorboard")


def test_report_has_the_original_fields_and_can_be_regenerated(train):
    run = train("--print-freq=1", "--skip-steps=2").run
    file = run.path / "report.json"
    report = json.loads(file.read_text())
    assert set(ORIGINAL_REPORT_FIELDS) <= set(report)
    assert report["num_intervals"] == 2  # four steps, two of them skipped
    assert report["train_fps_min"] <= report["train_fps_mean"] <= report["train_fps_max"]
    assert 0 <= report["data_wait_share"] <= 1
    measured = [e for e in run.events("train") if e["is_measured"]]
    seconds = sum(e["interval_seconds"] for e in measured)
    assert report["train_fps_mean"] == pytest.approx(sum(e["interval_images"] for e in measured) / seconds)
    file.unlink()
    assert python("-m", "vgglab.report", run.path).returncode == 0
    assert json.loads(file.read_text()) == report


def test_accuracy_does_not_depend_on_the_batch_size(train):
    """There are 9 held-out images; 2, 4, 5 and 64 do not divide 9."""
    trained = train()
    weights = trained.run.checkpoint("last")
    reference = trained.run.events("eval")[-1]
    for batch_size in (1, 2, 4, 5, 9, 64):
        result = train("--test-only", f"--resume={weights}", f"--batch-size={batch_size}")
        (event,) = result.run.events("eval")
        for metric in ("acc1", "acc5", "num_images"):
            assert event[metric] == reference[metric]
        assert event["loss"] == pytest.approx(reference["loss"], rel=1e-4)  # other kernels round differently


def test_resumed_run_equals_an_uninterrupted_run(train):
    flags = ("--seed=7", "--dropout-rate=0.5", "--print-freq=1", "--model=vgg11_bn")
    uninterrupted = train(*flags, "--epochs=3").run
    repeated = train(*flags, "--epochs=3", "--start-epoch=0", "--training-step-per-epoch=-1").run
    assert losses(uninterrupted) == losses(repeated)  # training is reproducible
    first = train(*flags, "--epochs=1", "--lr-schedule=step").run
    resumed = train(*flags, "--epochs=3", f"--resume={first.path}").run
    assert losses(first) + losses(resumed) == losses(uninterrupted)
    assert [e["step"] for e in resumed.events("train")] == list(range(5, 13))
    weights = [load_tensors(run.checkpoint("last"))["model"] for run in (uninterrupted, resumed)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_resuming_a_finished_run_keeps_its_best_accuracy(train):
    first = train("--epochs=2").run
    again = train("--epochs=2", f"--resume={first.path}")
    assert again.code == 0
    assert "nothing left to train" in again.out
    assert again.run.report()["acc1"] == first.report()["acc1"]
    assert again.run.events("train") == []


def test_best_checkpoint_is_kept_when_accuracy_drops(train):
    run = train("--model=vgg11_bn", "--epochs=10", "--seed=4", "--lr=2").run
    accuracies = [event["acc1"] for event in run.events("eval")]
    best = load_tensors(run.checkpoint("best"))
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1  # the first epoch with the best accuracy
    assert best["best"]["acc1"] == max(accuracies)
    assert sorted(os.listdir(run.path / "checkpoints")) == ["best.pt", "last.pt", "previous.pt"]
    again = train("--test-only", f"--resume={run.checkpoint('best')}", "--model=vgg11_bn").run
    assert again.report()["acc1"] == run.report()["acc1"] == max(accuracies)
    diverged = train(
        "--model=vgg11_bn", "--epochs=11", "--lr=1e4", "--training-step-per-epoch=1", f"--resume={run.path}"
    ).run
    kept = load_tensors(diverged.checkpoint("best"))
    assert (kept["epoch"], load_tensors(diverged.checkpoint("last"))["epoch"]) == (best["epoch"], 11)


def test_resumed_run_without_improvement_keeps_the_best_checkpoint(train):
    first = train("--lr=0.1").run
    resumed = train("--lr=0", "--epochs=2", f"--resume={first.path}").run
    assert resumed.checkpoint("best").read_bytes() == first.checkpoint("best").read_bytes()


def test_readme_resume_commands_need_no_other_flags(images, tmp_path, capsys, narrow):
    from vgglab.train import main

    recipe = ("--model=vgg11_bn", "--lr=0.3", "--lr-schedule=cosine", f"--data-path={images}", "--dropout-rate=0.5")
    first, longer, evaluated = (tmp_path / name for name in ("first", "longer", "evaluated"))
    assert main([*TINY, *recipe, "--amp", f"--run-dir={first}"]) == 0
    assert main([f"--resume={first}", "--epochs=2", "--workers=0", f"--run-dir={longer}"]) == 0
    assert main([f"--resume={longer}", "--test-only", "--workers=0", f"--run-dir={evaluated}"]) == 0
    changes = re.findall("--resume: .*", capsys.readouterr().out)
    assert changes == ["--resume: --epochs 2, was 1"]  # the cosine schedule depends on --epochs
    settings = [Run(path).config for path in (first, longer)]
    differing = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert differing <= {"epochs", "resume", "run_dir", "amp", "device"}
    assert Run(longer).events("start")[0]["first_epoch"] == 1
    assert Run(evaluated).report()["acc1"] == Run(longer).events("eval")[-1]["acc1"]


def test_flags_given_with_resume_override_and_conflicts_are_refused(train, refused, tmp_path):
    first = train("--nesterov", "--amp", "--seed=7").run
    plain = train("--epochs=2", "--amp=false", "--fix-seed", f"--resume={first.path}").run
    assert (plain.config["amp"], plain.config["amp_dtype"], plain.config["seed"]) == (False, None, 1 << 20)
    assert plain.config["nesterov"] is True
    assert "--nesterov: needs" in refused("--epochs=2", "--momentum=0", f"--resume={first.path}")
    content = load_tensors(first.checkpoint("last"))
    for setting in ({"lr": "abc"}, {"optimizer": "nonsense"}):
        torch.save({**content, "config": {**content["config"], **setting}}, tmp_path / "damaged.pt")
        assert f"setting {next(iter(setting))} is invalid" in refused("--epochs=2", f"--resume={tmp_path}/damaged.pt")


def test_run_can_be_resumed_from_another_directory(images, tmp_path, monkeypatch):
    from vgglab.train import main

    monkeypatch.chdir(images.parent)
    assert main([*TINY, f"--data-path={images.name}", "--run-dir=here"]) == 0
    run = Run("here")
    monkeypatch.chdir("/")
    assert main([f"--resume={run.path}", "--test-only", f"--run-dir={tmp_path}/there"]) == 0
    assert Run(tmp_path / "there").report()["acc1"] == run.report()["acc1"]


def test_named_set_is_used_again_although_a_folder_has_the_same_name(images, narrow, tmp_path, monkeypatch):
    """config.json recorded the folder: a resumed run and vgglab.predict used its images instead of the named set's."""
    from vgglab.train import main

    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for label in range(10):  # as many classes as in the named set, so that no message points to the folder
            shutil.copytree(images / split / CLASSES[0], f"digits/{split}/{label}")
    flags = ["--batch-size=16", "--training-step-per-epoch=1", "--eval-step-per-epoch=1"]
    assert main([*TINY, *flags, "--data-path=digits", "--run-dir=first"]) == 0
    assert main(["--resume=first", "--epochs=2", "--workers=0", "--run-dir=second"]) == 0
    first, second = Run("first"), Run("second")
    assert (first.config["data_path"], second.config["data_path"]) == ("digits", "digits")
    assert [run.events("start")[0]["num_eval_images"] for run in (first, second)] == [360, 360]
    assert len(vgglab.predict(first)) == 360


def test_shortened_evaluation_samples_all_classes(images, train):
    """It used the first images, which are all of one class. Here, images of the other classes are unreadable."""
    for name in CLASSES[1:]:
        for file in (images / "val" / name).iterdir():
            file.write_bytes(b"no image")
    run = train("--on-bad-image=skip", "--eval-step-per-epoch=1", "--batch-size=3", "--epochs=1").run
    assert run.events("eval")[0]["num_images"] == 1


@pytest.mark.parametrize(
    ("before", "after", "reported"),
    [
        ((), ("--decoder=fast",), "--decoder fast, was pil"),
        ((), ("--sync-bn",), "--sync-bn True, was False"),
        ((), ("--on-bad-image=skip",), "--on-bad-image skip, was fail"),
        (("--lr-schedule=cosine",), ("--epochs=4",), "--epochs 4, was 2"),
        (("--lr-schedule=step",), ("--epochs=4",), None),  # the learning rate of the first two epochs is the same
        ((), ("--print-freq=3", "--init=normal", "--workers=1"), None),
    ],
)
def test_resuming_reports_changed_settings_that_affect_weights(train, before, after, reported):
    """The first four changes were not reported."""
    if "--decoder=fast" in after:
        pytest.importorskip("simplejpeg")
    first = train("--epochs=2", "--training-step-per-epoch=1", "--decoder=pil", *before).run
    run = train("--epochs=3", *after, f"--resume={first.path}").run
    changes = [text for text in run.report()["warnings"] if text.startswith("--resume: ")]
    assert changes == ([] if reported is None else [f"--resume: {reported}"])


def test_best_accuracy_on_other_held_out_images_is_not_carried_over(train):
    """An accuracy of 100 % on one image stayed the best of a resumed run that is evaluated on all images."""
    first = train("--epochs=1", "--eval-step-per-epoch=1", "--batch-size=1").run
    run = train("--epochs=2", f"--resume={first.path}").run
    assert run.events("start")[0]["best"] is None
    assert run.report()["acc1"] == run.report()["acc1_last"] == run.events("eval")[-1]["acc1"]
    assert any("is not carried over" in text for text in run.report()["warnings"])
    again = train("--epochs=3", f"--resume={run.path}").run
    assert again.events("start")[0]["best"]["acc1"] == run.report()["acc1"]
    more = train("--epochs=2", "--eval-step-per-epoch=1", "--batch-size=3", f"--resume={first.path}").run
    assert more.events("start")[0]["best"] is None  # three images instead of one
    assert train("--epochs=2", f"--run-dir={first.path}", "--resume=auto").code == 0
    in_place = Run(first.path)
    assert in_place.report()["acc1"] == in_place.report()["acc1_last"] == in_place.events("eval")[-1]["acc1"]
    assert in_place.report()["acc5"] == in_place.events("eval")[-1]["acc5"]


@pytest.mark.parametrize(
    ("name", "value"), [("eval_step_per_epoch", torch.zeros(3)), ("lr", torch.zeros(3)), ("crops", "a\nwarning: b")]
)
def test_checkpoint_setting_that_is_not_a_plain_value_is_refused(train, refused, name, value):
    run = train().run
    content = load_tensors(run.checkpoint("last"))
    content["config"][name] = value
    torch.save(content, run.checkpoint("last"))
    assert "is damaged" in refused(f"--resume={run.checkpoint('last')}", "--epochs=2", "--lr=0.1")


def test_unclassified_setting_counts_as_affecting_weights():
    from vgglab.settings.flags import AFFECTS, flag

    assert flag("help").metadata["affects"] == "weights"
    with pytest.raises(KeyError):
        flag("help", affects="unknown")
    assert {item.metadata["affects"] for item in fields(Request)} == {*AFFECTS}


def test_resumed_run_keeps_the_seed_and_applies_new_flags(train, refused):
    first = train("--weight-decay=0.5").run
    result = train("--epochs=2", "--momentum=0.5", "--weight-decay=0.3", f"--resume={first.path}")
    assert result.run.config["seed"] == first.config["seed"]  # which the first run chose at random
    groups = load_tensors(result.run.checkpoint("last"))["optimizer"]["param_groups"]
    assert (groups[0]["momentum"], groups[0]["weight_decay"]) == (0.5, 0.3)
    assert "--resume: --momentum 0.5, was 0.9" in result.out
    assert "--weight-decay 0.3, was 0.5" in result.out
    line = refused("--epochs=2", "--optimizer=rmsprop", f"--resume={first.path}")
    assert "was written with --optimizer sgd" in line


def test_skip_steps_applies_again_after_resume(train):
    first = train("--skip-steps=1").run
    resumed = train("--epochs=2", "--skip-steps=2", "--print-freq=1", f"--resume={first.path}").run
    assert [(e["step"], e["is_measured"]) for e in resumed.events("train")] == [
        (5, False), (6, False), (7, True), (8, True),
    ]  # fmt: skip


def test_train_runs_as_a_file_and_as_a_module(images, tmp_path):
    """Run as a file, it does not put its own directory on sys.path, where it would hide other modules."""
    (tmp_path / "launch.py").write_text("raise SystemExit('wrong module')")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('PATH', [p for p in sys.path if p.endswith('vgglab')], file=sys.stderr))\n"
    )
    flags = [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--training-step-per-epoch=1"]
    for entry_point in ([str(PROJECT / "vgglab" / "train.py")], ["-m", "vgglab.train"]):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = shell("python", *entry_point, *flags, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        assert "PATH []" in result.stderr
    assert len(list(tmp_path.glob("runs/*/report.json"))) == 2


# Invalid input: one line that names the flag or the file, exit code 2, and no run directory.


def test_missing_and_empty_folders_are_refused(refused, images, tmp_path):
    assert "--data-path /nowhere: no such folder" in refused(data="/nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no train/ folder" in refused(data=tmp_path / "empty")
    (images / "train" / "n04").mkdir()
    assert "class folder train/n04 contains no images" in refused()
    (images / "train" / "n04").rmdir()
    (images / "val").rename(images / "elsewhere")
    assert "has no val/ folder" in refused()


def test_unreadable_folders_are_refused(refused, images, tmp_path):
    (images / "train" / "n04").symlink_to("/nowhere")
    assert "n04 is a broken symbolic link" in refused()
    (images / "train" / "n04").unlink()
    assert "cannot be read" in refused(data="x" * 5000)
    assert "no such folder" in refused(data=images / "val/n01/n01_0.JPEG")
    assert "no such folder" in refused(data="two\nlines")


def test_decompression_bomb_is_refused(refused, images, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 48 * 40 // 3)
    assert "decompression bomb" in refused(after_start=True)


def test_class_mismatches_are_reported(refused, train, images):
    assert "--num-classes 2: " in (line := refused("--num-classes=2"))
    assert "has 3 classes" in line
    assert "--num-classes 4: " in refused("--num-classes=4")
    # The original example's four commands use 1000 for any data set: this is a warning, not an error.
    result = train("--num_classes=1000", "--training-step-per-epoch=1")
    assert result.code == 0
    assert "the data set has 3 classes" in result.out
    (images / "val" / "n01").rename(images / "val" / "n00")
    assert "val/n00 is not a class of train/" in refused()


def test_batch_larger_than_the_training_set_is_refused(refused):
    assert refused("--batch-size=19") == "--batch-size 19: larger than the training set (18 images)"


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_named_in_the_error(refused, train, images, workers):
    before = train("--epochs=1").run
    truncated = images / "train/n02/n02_3.JPEG"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    all_images = "--batch-size=6"  # divides 18, so that each epoch contains every image
    line = refused(f"--workers={workers}", all_images, after_start=True)
    assert str(truncated) in line
    assert "cannot be read as an image" in line
    assert before.checkpoint("last").exists()


def test_failure_is_recorded_in_the_run_directory(train, images):
    (images / "val/n02/n02_1.JPEG").write_bytes(b"")
    run = train().run
    assert run.status == "failed"
    assert "n02_1.JPEG" in run.events("end")[0]["error"]
    assert run.report()["status"] == "failed"


def test_unwritable_output_directory_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "--output-dir" in refused(f"--output-dir={tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"


def test_existing_run_is_not_overwritten(refused, train, tmp_path):
    (tmp_path / "old/checkpoints").mkdir(parents=True)
    assert "already contains a run" in refused(f"--run-dir={tmp_path}/old")
    assert train(f"--run-dir={tmp_path}/mine").code == 0
    config = (tmp_path / "mine/config.json").read_bytes()
    assert "already contains a run" in refused(f"--run-dir={tmp_path}/mine", "--epochs=3")
    assert (tmp_path / "mine/config.json").read_bytes() == config


def test_incompatible_checkpoints_are_refused(refused, train, tmp_path):
    run = train().run
    assert "is a checkpoint of vgg11, but this run uses --model vgg13" in refused(
        f"--resume={run.path}", "--model=vgg13"
    )
    assert "check --num-classes, --head" in refused(f"--resume={run.path}", "--head=imagenet")
    assert "cannot be read" in refused("--resume=/nowhere.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "not a checkpoint" in refused(f"--resume={tmp_path}/text.pt")
    content = run.checkpoint("last").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(content[: len(content) // 2])
    assert "not a checkpoint" in refused(f"--resume={tmp_path}/truncated.pt")
    weights = load_tensors(run.checkpoint("last"))["model"]
    torch.save({"model": weights, "config": "a string"}, tmp_path / "bad-config.pt")
    assert train(f"--resume={tmp_path}/bad-config.pt", "--test-only").code == 0
    torch.save({"model": {1: weights["features.0.weight"]}}, tmp_path / "keys.pt")
    assert "contains no model weights" in refused(f"--resume={tmp_path}/keys.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    assert "contains no model weights" in refused(f"--resume={tmp_path}/numbers.pt")
    torch.save(weights, tmp_path / "weights.pt")
    assert "contains weights only" in refused(f"--resume={tmp_path}/weights.pt", "--epochs=2")
    assert train(f"--resume={tmp_path}/weights.pt", "--test-only").code == 0


UNSAFE = {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


def test_loading_a_checkpoint_never_executes_code(refused, tmp_path):
    created = tmp_path / "created"
    torch.save({"model": Malicious(str(created))}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": Malicious(str(created))}))
    for name in ("zip", "pickle"):
        assert "not a checkpoint that can be loaded safely" in refused(f"--resume={tmp_path}/{name}.pt")
    assert not created.exists()


def test_unpickler_for_old_torch_never_executes_code(tmp_path):
    """torch 1.10 has no weights_only, so vgglab uses its own unpickler there."""
    from vgglab.devices.compat import _PlainPickle

    content = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "epoch": 3}
    torch.save(content, tmp_path / "good.pt")
    read = torch.load(tmp_path / "good.pt", pickle_module=_PlainPickle, **UNSAFE)
    assert torch.equal(read["model"]["w"], content["model"]["w"])
    torch.save({"model": Malicious(str(tmp_path / "created"))}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "bad.pt", pickle_module=_PlainPickle, **UNSAFE)
    assert not (tmp_path / "created").exists()


def test_torchscript_archive_is_refused_on_old_torch(tmp_path):
    """torch 1.10 would pass it to torch.jit.load, which executes code from the archive."""
    from vgglab.devices.compat import NotACheckpoint, _reject_torchscript

    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(tmp_path / "script.pt"))
    torch.save({"w": torch.zeros(1)}, tmp_path / "plain.pt")
    with pytest.raises(NotACheckpoint, match="TorchScript"):
        _reject_torchscript(tmp_path / "script.pt")
    _reject_torchscript(tmp_path / "plain.pt")


def test_flipped_bits_never_give_wrong_weights_or_a_traceback(tmp_path):
    """Bits of the zip directory: some flips caused a traceback, one loaded wrong weights."""
    weights = torch.arange(4.0)
    torch.save({"model": {"weight": weights}}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    entries = [offset for offset in range(len(content)) if content.startswith(b"PK\x01\x02", offset)]
    [entry] = [offset for offset in entries if b"/data/0" in content[offset + 46 : offset + 70]]  # of the weights
    for offset in [*range(entry, entry + 46), *range(len(content) - 98, len(content))]:
        for bit in range(8):
            damaged = bytearray(content)
            damaged[offset] ^= 1 << bit
            (tmp_path / "damaged.pt").write_bytes(damaged)
            try:
                loaded = checkpoint.read(tmp_path / "damaged.pt")
            except UserError:
                continue
            assert torch.equal(loaded["model"]["weight"], weights), (offset, bit)


@pytest.mark.parametrize(
    "damage",
    [{"optimizer": {}}, {"optimizer": None}, {"epoch": "three"}, {"best": 3}, {"config": {}}, {"config": None},
     {"images": -100}, {"epoch": -5}, {"step": -1}, {"epoch": 2**62}, {"best": {}}, {"trained": 5}, {"momentum": "x"},
     {"best": {"acc1": float("nan"), "acc5": 1.0}}, {"momentum": torch.zeros(3)}],
)  # fmt: skip
def test_damaged_checkpoint_is_refused(refused, train, tmp_path, damage):
    content = load_tensors(train().run.checkpoint("last"))
    if "momentum" in damage:
        content["optimizer"]["state"][0]["momentum_buffer"] = damage["momentum"]
    torch.save({**content, **damage}, tmp_path / "damaged.pt")
    assert "--resume" in refused(f"--resume={tmp_path}/damaged.pt", "--epochs=2")


@pytest.mark.parametrize("missing", ["step", "square_avg", "all"])
def test_checkpoint_with_incomplete_optimizer_state_is_refused(refused, train, tmp_path, missing):
    content = load_tensors(train("--optimizer=rmsprop").run.checkpoint("last"))
    if missing == "all":
        del content["optimizer"]["state"][0]
    else:
        del content["optimizer"]["state"][0][missing]
    torch.save(content, tmp_path / "damaged.pt")
    line = refused(f"--resume={tmp_path}/damaged.pt", "--epochs=2", "--optimizer=rmsprop")
    assert re.search(r"is damaged \(entry \S+ is missing\)", line)


class StepFree(torch.optim.SGD):
    """Keeps a mean of the gradients but, like Lion, does not count its steps."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 0.1)
                weight.sub_(mean.sign(), alpha=group["lr"])


@pytest.mark.parametrize("name", [*OPTIMIZERS, "without a step count"])
def test_a_run_resumes_with_every_optimizer(train, monkeypatch, name):
    """Every optimizer with state_keys had to have an entry "step", so a run with Lion could not be resumed."""
    if name not in OPTIMIZERS:
        name = "sgd"  # one of the parser's choices
        spec = OptimizerSpec(StepFree, (), changes_every_step=False, state_keys=("exp_avg",))
        monkeypatch.setitem(OPTIMIZERS, name, spec)
    flags = (f"--optimizer={name}", "--lr=0.001", "--seed=1")
    first = train(*flags, "--epochs=1").run
    resumed = train(*flags, "--epochs=2", f"--resume={first.path}").run
    straight = train(*flags, "--epochs=2").run
    losses = [[(event["step"], event["loss"]) for event in run.events("train")] for run in (first, resumed, straight)]
    assert losses[0] + losses[1] == losses[2]


def test_two_ranks_report_the_accuracy_of_the_saved_weights(images, tmp_path):
    """Batch-norm statistics differ between ranks; only those of rank 0 are saved."""
    flags = [*TINY, f"--data-path={images}", "--model=vgg11_bn", "--lr=0.5", "--batch-size=2", "--epochs=2"]
    result = ranks(2, "-m", "vgglab.train", *flags, f"--run-dir={tmp_path}/two")
    assert result.returncode == 0, result.stderr
    assert "FutureWarning: `broadcast" not in result.stderr
    again = ("--test-only", f"--resume={tmp_path}/two", "--device=cpu", "--workers=0", f"--run-dir={tmp_path}/one")
    assert python("-m", "vgglab.train", *again).returncode == 0
    (one,) = Run(tmp_path / "one").events("eval")
    two = Run(tmp_path / "two").events("eval")[-1]
    assert (one["acc1"], one["num_images"]) == (two["acc1"], two["num_images"]) == (one["acc1"], 9)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_run_survives_a_closed_output_pipe(images, tmp_path):
    flags = " ".join([*TINY, f"--data-path={images}", f"--run-dir={tmp_path}/run"])
    result = shell("bash", "-c", f"{sys.executable} -m vgglab.train {flags} | true")
    assert "Traceback" not in result.stderr
    assert Run(tmp_path / "run").status == "done"


def test_missing_devices_are_refused(refused):
    assert "--device gcu: torch_gcu is not installed" in refused("--device=gcu")
    assert "--device mps: PyTorch finds no Metal device" in refused("--device=mps")
    if not torch.cuda.is_available():
        assert "--device cuda: PyTorch finds no CUDA device" in refused("--device=cuda")


@pytest.mark.parametrize("before", [(), (signal.SIGTERM,)], ids=["ctrl-c", "ctrl-c-after-sigterm"])
def test_ctrl_c_saves_a_checkpoint_and_marks_the_run_interrupted(images, tmp_path, before):
    flags = [*TINY, f"--data-path={images}", f"--run-dir={tmp_path}/run", "--epochs=1000", "--workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vgglab.train", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_until((tmp_path / "run/checkpoints/last.pt").exists)
    for number in before:
        process.send_signal(number)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(MAX_WAIT_SECONDS)
    assert process.returncode == 130
    run = Run(tmp_path / "run")
    assert run.status == "interrupted"
    assert run.report()["acc1"] is not None
    step = run.events("checkpoint")[-1]["step"]
    assert load_tensors(run.checkpoint("last"))["step"] == step >= run.events("train")[-1]["step"]
    message = f"stopped by Ctrl-C after step {step}, checkpoint saved; continue with --run-dir {run.path} --resume auto"
    assert process.stderr.read().splitlines()[-1] == f"vgglab.train: {message}"


def test_out_of_memory_is_a_one_line_error_and_the_run_has_failed(tmp_path):
    """With a limit on the address space, in place of a machine whose memory is used up."""
    import resource

    code = "import vgglab.trainer; print(open('/proc/self/status').read().split('VmSize:')[1].split()[0])"
    limit = (int(python("-c", code).stdout) + 1_500_000) * 1024
    flags = [*TINY, "--data-path=fake", "--image-size=64", "--batch-size=2048", f"--run-dir={tmp_path / 'run'}"]
    limit_memory = partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))
    result = python("-m", "vgglab.train", *flags, preexec_fn=limit_memory)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith("vgglab.train: error: --batch-size 2048: out of memory on cpu (")
    assert Run(tmp_path / "run").status == "failed"


COMPILER = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch._dynamo":
            print("imports the compiler", file=sys.stderr, flush=True)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("rank_flags", [(), ("--nproc=2", "--batch-size=2")], ids=["one-rank", "two-ranks"])
def test_training_without_compilation_does_not_import_the_compiler(images, tmp_path, rank_flags):
    """The import takes seconds in each process. Trains twice, because the second run also loads a checkpoint."""
    (tmp_path / "sitecustomize.py").write_text(COMPILER)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    args = ["-m", "vgglab.train", *TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}", "--resume=auto"]
    for epochs in (1, 2):
        result = shell("python", *args, *rank_flags, f"--epochs={epochs}", env=environment)
        assert (result.returncode, result.stderr) == (0, "")
    assert Run(tmp_path / "run").status == "done"


@pytest.mark.parametrize("value", ["soon", "-1", "inf", "100000"])
def test_invalid_grace_period_is_refused(refused, monkeypatch, tmp_path, value):
    monkeypatch.setenv("VGGLAB_GRACE_SECONDS", value)
    message = f"VGGLAB_GRACE_SECONDS: {value!r} is not a number of seconds from 0 to 99999, such as 10"
    assert refused() == message
    with pytest.raises(UserError, match=message):
        vgglab.launch(run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_succeeds_with_stderr_closed(images, tmp_path):
    args = [sys.executable, "-m", "vgglab.train", *TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}"]
    result = subprocess.run(
        ["bash", "-c", 'exec "$@" 2>&-', "bash", *args], cwd=PROJECT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    run = Run(tmp_path / "run")
    assert run.status == "done"
    assert all(json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines())


def test_repeated_ctrl_c_prints_one_final_line(images, tmp_path):
    args = [*TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}", "--epochs=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vgglab.train", *args], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_until(lambda: (tmp_path / "run/events.jsonl").exists() and Run(tmp_path / "run").events("train"))
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    err = process.communicate()[1].decode()
    assert process.returncode == 130
    [last] = [line for line in err.splitlines() if line.startswith("vgglab.train: ")]
    # The second Ctrl-C may have come while the first was saving a checkpoint.
    assert re.match("vgglab.train: (interrupted|stopped by Ctrl-C after step [0-9]+, checkpoint saved); ", last)
    assert last.endswith(f"; continue with --run-dir {tmp_path / 'run'} --resume auto")
    assert "Traceback" not in err
    assert "press it again to stop at once" in err
    assert Run(tmp_path / "run").status == "interrupted"


def test_ctrl_c_in_a_finalizer_is_silent_and_the_next_one_raises():
    """A generator was being closed when the second Ctrl-C came: its traceback was the last output."""
    code = """
import signal
from vgglab.dist.interrupts import defer_signals
def batches():
    try:
        yield
    finally:
        signal.raise_signal(signal.SIGINT)
with defer_signals():
    signal.raise_signal(signal.SIGINT)
    iterator = batches()
    next(iterator)
    del iterator
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted")
"""
    result = python("-c", code)
    assert (result.stdout, "Traceback" in result.stderr) == ("interrupted\n", False), result.stderr


def test_segmentation_fault_logs_a_stack_trace(images, tmp_path):
    """As in a vendor's library: the stack trace is in the log, and with several ranks also among the failures."""
    (tmp_path / "sitecustomize.py").write_text(
        "import faulthandler, os\nimport vgglab.pace as pace\n"
        "def end_own_work(clock):\n    faulthandler._sigsegv()\n"
        "if os.environ.get('RANK') != '0':\n    pace.Clock.end_own_work = end_own_work\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}", "OMP_NUM_THREADS": "1"}
    args = ["-m", "vgglab.train", *TINY, f"--data-path={images}"]
    one = shell("python", *args, f"--run-dir={tmp_path / 'one'}", env=environment)
    assert one.returncode == -signal.SIGSEGV
    assert "in end_own_work" in Run(tmp_path / "one").logs()
    two = shell("python", *args, f"--run-dir={tmp_path / 'two'}", "--nproc=2", env=environment)
    assert two.returncode == 1
    cause = Run(tmp_path / "two").failures()[0]
    assert (cause["rank"], cause["error"]) == (1, "was killed (SIGSEGV)")
    assert "in end_own_work" in cause["traceback"]
