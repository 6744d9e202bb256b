"""python -m vgglab.train: what it leaves behind, what it refuses, how it goes on."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import NUM_VAL, PROJECT, TINY, shell

from vgglab import Run

SEED_REPORT_FIELDS = (
    "model local_rank batch_size epochs training_step_per_epoch eval_step_per_epoch acc1 acc5 device skip_steps "
    "train_fps_mean train_fps_min train_fps_max training_time"
).split()


def losses(run):
    return [event["loss"] for event in run.events("train")]


def test_a_run_leaves_everything_the_house_promises(train):
    result = train("--epochs=2", "--print-freq=1", "--skip-steps=2", "--tensorboard")
    assert result.code == 0
    run = result.run
    assert run.status == "done"
    left = {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}
    scalars = {file for file in left if file.startswith("tensorboard/")}
    assert len(scalars) == 1
    assert left - scalars == {
        "config.json", "env.json", "events.jsonl", "report.json", "log/rank0.txt",
        "checkpoints/last.pt", "checkpoints/best.pt",
    }  # fmt: skip
    events = run.events()
    assert (events[0]["event"], events[0]["schema"]) == ("start", 1)
    assert [event["step"] for event in run.events("train")] == list(range(1, 9))
    assert [(e["epoch"], e["num_images"]) for e in run.events("eval")] == [(0, 3 * NUM_VAL), (1, 3 * NUM_VAL)]
    assert events[-1]["event"] == "end"
    assert run.config["num_classes"] == 3  # resolved, not as given
    assert run.env["simulated"] is False
    assert run.env["world_size"] == 1
    assert torch.__version__.startswith(run.env["versions"]["torch"])
    assert "held-out images" in run.logs()
    assert run.logs() in result.out


def test_the_report_has_the_seeds_fields_and_can_be_made_again(train):
    run = train("--print-freq=1", "--skip-steps=2").run
    file = run.path / "report.json"
    report = json.loads(file.read_text())
    assert set(SEED_REPORT_FIELDS) <= set(report)
    assert report["num_intervals"] == 2  # four steps, two of them skipped
    assert report["train_fps_min"] <= report["train_fps_mean"] <= report["train_fps_max"]
    assert 0 <= report["data_wait_share"] <= 1
    measured = [e for e in run.events("train") if not e["warmup"]]
    seconds = sum(e["interval_seconds"] for e in measured)
    assert report["train_fps_mean"] == pytest.approx(sum(e["interval_images"] for e in measured) / seconds)
    file.unlink()
    assert shell("python", "-m", "vgglab.report", run.path).returncode == 0
    assert json.loads(file.read_text()) == report


def test_accuracy_does_not_depend_on_the_batch_size(train):
    """9 images; no batch size here but 1, 3 and 9 divides them."""
    trained = train()
    weights = trained.run.checkpoint("last")
    figures = set()
    for batch_size in (1, 2, 4, 5, 9, 64):
        result = train("--test-only", f"--resume={weights}", f"--batch-size={batch_size}")
        (event,) = result.run.events("eval")
        figures.add((event["acc1"], event["acc5"], round(event["loss"], 5), event["num_images"]))
    assert len(figures) == 1
    assert figures.pop()[:2] == (trained.run.events("eval")[-1]["acc1"], trained.run.events("eval")[-1]["acc5"])


def test_a_resumed_run_equals_the_one_that_was_not_stopped(train):
    flags = ("--seed=7", "--dropout-rate=0.5", "--print-freq=1", "--model=vgg11_bn")
    whole = train(*flags, "--epochs=3").run
    part = train(*flags, "--epochs=3", "--start-epoch=0", "--training-step-per-epoch=-1").run
    assert losses(whole) == losses(part)  # the same twice, first of all
    first = train(*flags, "--epochs=1", "--lr-schedule=step").run
    resumed = train(*flags, "--epochs=3", f"--resume={first.path}").run
    assert losses(first) + losses(resumed) == losses(whole)
    assert [e["step"] for e in resumed.events("train")] == list(range(5, 13))
    ends = [torch.load(run.checkpoint("last"), weights_only=True)["model"] for run in (whole, resumed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_resuming_a_finished_run_reports_it_and_remembers_its_best(train):
    first = train("--epochs=2").run
    again = train("--epochs=2", f"--resume={first.path}")
    assert again.code == 0
    assert "nothing left to train" in again.out
    assert again.run.report()["acc1"] == first.report()["acc1"]
    assert again.run.events("train") == []


def test_best_is_kept_while_last_moves_on(train, monkeypatch):
    from vgglab import engine

    verdicts = iter([True, False])
    real = engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda *args: (real(*args), next(verdicts))[1])
    run = train("--epochs=2").run
    saved = {which: torch.load(run.checkpoint(which), weights_only=True) for which in ("best", "last")}
    assert (saved["best"]["epoch"], saved["last"]["epoch"]) == (1, 2)
    assert sorted(os.listdir(run.path / "checkpoints")) == ["best.pt", "last.pt"]


def test_each_file_and_each_module_is_a_door(images, tmp_path):
    """The file does not put its own folder in front of other people's modules."""
    (tmp_path / "launch.py").write_text("raise SystemExit('not ours')")
    check = tmp_path / "sitecustomize.py"
    check.write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('PATH', [p for p in sys.path if p.endswith('vgglab')], file=sys.stderr))\n"
    )
    flags = [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--training-step-per-epoch=1"]
    for door in ([str(PROJECT / "vgglab" / "train.py")], ["-m", "vgglab.train"]):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = shell("python", *door, *flags, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        assert "PATH []" in result.stderr
    assert len(list(tmp_path.glob("runs/*/report.json"))) == 2


# Bad input. Each gets one line that names the flag or the file, exit code 2, and no run directory.


def test_missing_and_empty_folders(refused, images, tmp_path):
    assert "--data-path /nowhere: no such folder" in refused(data="/nowhere")
    (tmp_path / "bare").mkdir()
    assert "has no train/ folder" in refused(data=tmp_path / "bare")
    (images / "train" / "n04").mkdir()
    assert "class folder train/n04 holds no images" in refused()
    (images / "train" / "n04").rmdir()
    (images / "val").rename(images / "elsewhere")
    assert "has no val/ folder" in refused()


def test_classes_that_disagree(refused, train, images):
    assert "--num-classes 2: " in (line := refused("--num-classes=2"))
    assert "has 3 classes" in line
    assert "--num-classes 4: " in refused("--num-classes=4")
    # The seed kit's four commands all say 1000, whatever the folder: that trains, and says so.
    result = train("--num_classes=1000", "--training-step-per-epoch=1")
    assert result.code == 0
    assert "the folder has 3 classes" in result.out
    (images / "val" / "n01").rename(images / "val" / "n00")
    assert "val/n00 is not a class of train/" in refused()


def test_a_batch_larger_than_the_set(refused):
    assert refused("--batch-size=19") == "--batch-size 19: larger than the training set (18 images)"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_and_nothing_is_lost(refused, train, images, workers):
    before = train("--epochs=1").run
    broken = images / "train/n02/n02_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:-200])
    every_image = "--batch-size=6"  # divides 18: none is left out by the shuffle
    line = refused(f"--workers={workers}", every_image, in_the_middle=True)
    assert str(broken) in line
    assert "cannot be read as an image" in line
    assert before.checkpoint("last").exists()


def test_a_failed_run_says_so_in_its_directory(train, images):
    (images / "val/n02/n02_1.JPEG").write_bytes(b"")
    run = train().run
    assert run.status == "failed"
    assert "n02_1.JPEG" in run.events("end")[0]["error"]
    assert run.report()["status"] == "failed"


def test_an_output_directory_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "--output-dir" in refused(f"--output-dir={tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_run_directory_is_not_written_twice(refused, train, tmp_path):
    assert train(f"--run-dir={tmp_path}/mine").code == 0
    config = (tmp_path / "mine/config.json").read_bytes()
    assert "holds a run already" in refused(f"--run-dir={tmp_path}/mine", "--epochs=3")
    assert (tmp_path / "mine/config.json").read_bytes() == config


def test_checkpoints_that_do_not_fit(refused, train, tmp_path):
    run = train().run
    assert "is a checkpoint of vgg11, this run is --model vgg13" in refused(f"--resume={run.path}", "--model=vgg13")
    assert "check --num-classes, --head" in refused(f"--resume={run.path}", "--image-size=224")
    assert "cannot be read" in refused("--resume=/nowhere.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "not a checkpoint" in refused(f"--resume={tmp_path}/text.pt")
    whole = run.checkpoint("last").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "not a checkpoint" in refused(f"--resume={tmp_path}/cut.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    assert "holds no model weights" in refused(f"--resume={tmp_path}/numbers.pt")
    torch.save(torch.load(run.checkpoint("last"), weights_only=True)["model"], tmp_path / "weights.pt")
    assert "holds weights only" in refused(f"--resume={tmp_path}/weights.pt", "--epochs=2")
    assert train(f"--resume={tmp_path}/weights.pt", "--test-only").code == 0


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


def test_a_checkpoint_never_runs_code(refused, tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"model": Trap(str(sprung))}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": Trap(str(sprung))}))
    for name in ("zip", "pickle"):
        assert "not a checkpoint that can be read safely" in refused(f"--resume={tmp_path}/{name}.pt")
    assert not sprung.exists()


def test_devices_that_are_not_there(refused):
    assert "--device gcu: this version does not drive GCU cards yet" in refused("--device=gcu")
    assert "--device mps: this is not a Mac" in refused("--device=mps")
    if not torch.cuda.is_available():
        assert "--device cuda: PyTorch sees no CUDA card" in refused("--device=cuda")


def test_ctrl_c_ends_in_a_run_directory_that_says_so(images, tmp_path):
    flags = [*TINY, f"--data-path={images}", f"--run-dir={tmp_path}/run", "--epochs=1000", "--workers=2"]
    process = subprocess.Popen([sys.executable, "-m", "vgglab.train", *flags], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (tmp_path / "run/checkpoints/last.pt").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    run = Run(tmp_path / "run")
    assert run.status == "interrupted"
    assert run.report()["acc1"] is not None
