"""The defects that running the original example revealed, by row number: the same commands work here.

The row numbers are those of the list of 32 defects that vgglab started from (see CONTRIBUTING.md). Rows 3 to 5, 8, 12,
19, 21 and 30 (several cards) are in test_ranks.py and test_resume.py, rows 9, 10, 22 and 28 (data) in test_data.py and
test_decode.py. "Original:" in a docstring describes what the original example did.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import NUM_VAL, PROJECT, TINY, shell
from processes import ranks

from vgglab.devices.compat import load_tensors
from vgglab.model import HEADS, build
from vgglab.settings.parser import parse_flags


def learning_rates(run):
    return [event["lr"] for event in run.events("train")]


def test_row_1_test_only_evaluates_held_out_images_reproducibly(train, refused):
    """Original: it used shuffled, augmented training images, with varying results, and silently random weights."""
    trained = train().run
    runs = [train("--test-only", f"--resume={trained.path}").run for _ in range(2)]
    results = [{k: v for k, v in run.events("eval")[0].items() if k != "seconds"} for run in runs]
    assert results[0] == results[1]
    assert results[0]["num_images"] == 3 * NUM_VAL
    assert results[0]["acc1"] == trained.events("eval")[0]["acc1"]
    assert json.loads((runs[0].path / "report.json").read_text())["acc1"] == results[0]["acc1"]
    assert "nothing to evaluate" in refused("--test-only")


def test_row_2_first_step_of_an_epoch_has_its_learning_rate(train):
    """Original: the rate was set after the step, so it was the unscaled --lr at first, then one epoch late."""
    run = train("--epochs=3", "--warmup=2", "--print-freq=1", "--lr=0.64").run
    base = 0.64 * 4 / 256
    assert learning_rates(run) == pytest.approx([base / 2] * 4 + [base] * 8)
    events = run.events("train")
    assert [e["step"] for e in events if e["epoch"] == 1] == [5, 6, 7, 8]


def test_row_6_last_epoch_is_always_evaluated_and_saved(train, refused):
    """Original: with --eval-freq 2 and an odd number of epochs, the last epoch was lost, or everything."""
    for epochs in (1, 3):
        run = train("--eval-freq=2", f"--epochs={epochs}").run
        assert run.events("eval")[-1]["epoch"] == epochs - 1
        saved = load_tensors(run.checkpoint("last"))
        assert saved["epoch"] == epochs
        assert run.report()["acc1"] is not None
    assert "--epochs" in refused("--epochs=0")
    assert train("--epochs=3", f"--resume={run.path}").code == 0  # resuming a finished run


@pytest.mark.parametrize("flags", [("--skip-steps=4",), ("--skip-steps=100",)])
def test_row_7_too_few_steps_to_measure_speed_is_not_an_error(train, flags):
    """Original: writing the report crashed, before a checkpoint was saved."""
    result = train(*flags)
    assert result.code == 0
    assert result.run.report()["train_fps_mean"] is None
    assert "no speed measured: all 4 steps" in result.out
    assert result.run.checkpoint("last").exists()


def test_row_7_print_freq_above_the_step_count_still_measures_speed(train):
    report = train("--print-freq=1000", "--skip-steps=1").run.report()
    assert report["train_fps_mean"] > 0


def test_row_7_fewer_images_than_a_batch_is_an_error(refused):
    """Original: it made no step, and evaluated the untrained network."""
    assert "larger than the training set" in refused("--batch-size=100")


def test_row_11_requested_model_is_trained(train, refused):
    """Original: it always trained vgg16, but reported the requested model."""
    run = train("--model=vgg13_bn", "--training-step-per-epoch=1").run
    assert run.report()["model"] == "vgg13_bn"
    weights = load_tensors(run.checkpoint("last"))["model"]
    assert list(weights) == list(build("vgg13_bn", num_classes=3, head="small").state_dict())
    assert "--model: invalid choice: 'does_not_exist'" in refused("--model=does_not_exist")


def test_row_13_step_size_and_gamma_are_honoured(train):
    """Original: both were ignored; the drops were fixed at epochs 30, 60 and 80."""
    run = train("--epochs=3", "--lr-step-size=1", "--lr-gamma=0.5", "--lr=0.64").run
    base = 0.64 * 4 / 256
    assert sorted(set(learning_rates(run))) == pytest.approx([base / 4, base / 2, base])


@pytest.mark.usefixtures("narrow")
def test_row_13_broadcast_buffers_is_passed_to_ddp(images, tmp_path):
    code = (
        "import functools, os, sys, torch.nn.parallel.distributed as d\n"
        "original = d.DistributedDataParallel.__init__\n"
        "@functools.wraps(original)\n"
        "def init(self, *a, **k):\n"
        "    [value] = [v for n, v in k.items() if 'buffers' in n]\n"
        "    open(f'broadcast-{value}-{os.environ[\"RANK\"]}', 'w').close(); original(self, *a, **k)\n"
        "d.DistributedDataParallel.__init__ = init\n"
        "from vgglab.dist import ranks; from vgglab import train; ranks.exit_process(train.main(sys.argv[1:]))\n"
    )
    (tmp_path / "spy.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    for flag, expected in ((), "False"), (("--broadcast-buffers",), "True"):
        flags = [*TINY, f"--data-path={images}", "--training-step-per-epoch=1", *flag]
        result = ranks(2, tmp_path / "spy.py", *flags, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        # One file per rank: lines that two ranks print at the same time are mixed up.
        written = {file.name for file in tmp_path.glob("broadcast-*")}
        assert {f"broadcast-{expected}-{rank}" for rank in (0, 1)} <= written


@pytest.mark.parametrize("flag", ["--amp", "--torch-amp"])
def test_rows_14_and_15_amp_has_both_names_and_works_on_a_cpu(train, flag):
    """Original: --amp, though in its README, did not exist; --torch-amp crashed on the CPU in the first step."""
    run = train(flag).run
    assert run.status == "done"
    assert run.report()["amp_dtype"] == "bfloat16"


def test_rows_14_and_15_amp_changes_the_arithmetic(train):
    float32, mixed = (train("--seed=1", "--print-freq=1", *flags).run for flags in ((), ("--amp",)))
    losses = [[event["loss"] for event in run.events("train")] for run in (float32, mixed)]
    assert losses[0] != losses[1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)
    assert float32.report()["amp_dtype"] is None


def test_row_16_rmsprop_trains(train):
    """Original: its flags were missing, so creating the optimizer crashed."""
    run = train("--optimizer=rmsprop", "--rmsprop-alpha=0.99").run
    assert run.status == "done"
    groups = load_tensors(run.checkpoint("last"))["optimizer"]["param_groups"]
    assert groups[0]["alpha"] == 0.99


@pytest.mark.parametrize("workers", [0, 1])
def test_row_17_any_number_of_workers_works(train, workers):
    """Original: --workers=0, an example in its second README, always crashed."""
    assert train(f"--workers={workers}", "--epochs=2").code == 0


def test_row_18_gpu_is_an_alias_of_cuda(train, refused):
    """Original: its second README lists "cpu, gcu, gpu", but gpu crashed."""
    if torch.cuda.is_available():
        assert train("--device=gpu").run.report()["device"] == "cuda"
    else:
        assert "PyTorch finds no CUDA device" in refused("--device=gpu")


@pytest.mark.parametrize(
    ("flag", "alternative"),
    [
        ("--enable-horovod", "--nproc"),
        ("--enable_horovod=True", "--nproc"),
        ("--apex", "--amp"),
        ("--apex-opt-level=O1", "--amp"),
    ],
)
def test_row_20_unsupported_flags_name_the_alternative(refused, flag, alternative):
    assert alternative in refused(flag)


def test_row_20_false_means_false():
    """Original: --enable-horovod False meant True."""
    assert parse_flags(["--enable-horovod", "False"]).enable_horovod is False
    assert parse_flags(["--nesterov", "false", "--amp=no"]).nesterov is False


def test_row_23_pretrained_with_other_classes_replaces_the_last_layer(train, monkeypatch):
    """Original: a size mismatch. A file with the same name and shapes replaces the published weights here."""
    monkeypatch.setitem(HEADS, "imagenet", (7, 64))  # saves half a gigabyte; the width does not matter
    published = build("vgg11", init_weights=False).state_dict()
    name = torchvision.models.get_model_weights("vgg11")["IMAGENET1K_V1"].url.rsplit("/", 1)[1]
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(published, file)
    extra = ("--training-step-per-epoch=1", "--eval-step-per-epoch=1")
    result = train("--pretrained", "--image-size=224", "--lr=0", *extra)
    assert result.code == 0
    assert "--pretrained: random initial weights for classifier.6, because" in result.out
    trained = load_tensors(result.run.checkpoint("last"))["model"]
    assert torch.equal(trained["features.0.weight"], published["features.0.weight"])
    assert torch.equal(trained["classifier.3.weight"], published["classifier.3.weight"])
    assert trained["classifier.6.weight"].shape == (3, 64)


def test_row_24_run_resumes_from_its_own_checkpoint(train):
    """Original: torch 2.6 and later could not load its checkpoints."""
    first = train().run
    resumed = train("--epochs=2", f"--resume={first.checkpoint('last')}")
    assert resumed.code == 0
    assert [e["epoch"] for e in resumed.run.events("eval")] == [1]


def test_row_25_training_module_can_be_imported():
    """Original: its functions needed global variables of __main__."""
    code = "import vgglab.train, vgglab.trainer; print(vgglab.train.main(['--epochs=0']))"
    result = shell("python", "-c", code)
    assert result.stdout.strip() == "2"


def test_row_26_number_of_classes_is_checked_before_training(refused):
    """Original: too few crashed in the loss (on a card, as a device-side assert); too many were silently accepted."""
    assert "--num-classes 2" in refused("--num_classes=2")
    assert "--num-classes 99" in refused("--num_classes=99")


def test_row_27_top_5_accuracy_works_with_two_classes(train, images):
    """Original: top-5 was hard-coded."""
    for split in ("train", "val"):
        shutil.rmtree(images / split / "n03")
    run = train().run
    assert run.report()["acc5"] == 100.0


def test_row_29_hidden_folders_are_ignored_and_empty_ones_named(train, refused, images):
    (images / "train" / ".ipynb_checkpoints").mkdir()
    run = train().run
    assert run.config["num_classes"] == 3
    (images / "train" / "n09_empty").mkdir()
    assert "train/n09_empty contains no images" in refused()


def test_row_31_run_shorter_than_its_warmup_warns(train):
    """Original: its performance command never reached the base learning rate, and did not warn."""
    result = train("--warmup=5")
    assert "--epochs 1 ends during the warm-up (--warmup 5): the learning rate only reaches 20%" in result.out
    assert any("--warmup 5" in text for text in result.run.report()["warnings"])


def test_row_32_invalid_values_are_refused_before_data_is_read(refused, train):
    """Original: after scanning the data. It also printed stray numbers and offered a schedule that crashed."""
    assert "--num-classes: 'abc'" in refused("--num_classes=abc", data="/nowhere")
    assert "--lr-schedule" in refused("--lr-schedule=nonsense")
    lines = train().out.splitlines()
    assert not [line for line in lines if line.strip().isdigit()], lines


# The four commands of the original example's README, unchanged except for the paths of the script and the data.
ONE_CARD = "python -u vgglab/train.py"
EIGHT_CARDS = (
    "python -u -m torch.distributed.launch --nproc_per_node=8 --master_addr=127.0.0.1 --master_port=34568 "
    "--use_env vgglab/train.py"
)
PERFORMANCE = (
    "--device=gcu --data-path=DATA --batch-size=192 --num_classes=1000 --epochs=1 --model=vgg16 --workers=8 "
    "--training_step_per_epoch=300 --eval_step_per_epoch=300 --dropout_rate=0.0 --lr=0.01 --print-freq=20 "
    "--skip_steps=5"
)
CONVERGENCE = PERFORMANCE.replace("=300", "=-1").replace("--epochs=1 ", "--epochs=90 ").replace("rate=0.0", "rate=0.5")


@pytest.mark.parametrize("flags", [PERFORMANCE, CONVERGENCE])
def test_the_four_commands_are_parsed(flags):
    config = parse_flags(flags.split())
    assert (config.batch_size, config.num_classes, config.skip_steps, config.workers) == (192, 1000, 5, 8)
    assert config.epochs == (1 if "=300" in flags else 90)


@pytest.mark.parametrize("launch", [ONE_CARD, EIGHT_CARDS.replace("=8", "=2")])
def test_the_four_commands_run_when_shortened(launch, images, tmp_path):
    """On the CPU, with smaller images and batches, and two ranks instead of eight; all else is unchanged."""
    workers = 3
    extra = [f"--output-dir={tmp_path}", "--device=cpu", "--batch-size=2", "--image-size=32", f"--workers={workers}"]
    extra += ["--training_step_per_epoch=3", "--eval_step_per_epoch=3", "--model=vgg11", "--epochs=1"]
    result = shell(*launch.split(), *PERFORMANCE.replace("DATA", str(images)).split(), *extra)
    assert result.returncode == 0, result.stderr
    (report,) = (json.loads(file.read_text()) for file in tmp_path.glob("runs/*/report.json"))
    num_ranks = 2 if "distributed" in launch else 1
    assert (report["status"], report["world_size"], report["global_batch_size"]) == ("done", num_ranks, 2 * num_ranks)
    assert result.stdout.count("run directory") == 1  # only one rank prints
    assert "DataLoader" not in result.stderr  # torch's warning about more workers than cores
    assert f"--workers {workers}: more than the" in result.stdout or (os.cpu_count() or 1) >= workers
