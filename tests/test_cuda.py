"""Training on a CUDA card, and errors that only a card can show; skipped without a card."""

import json
import os
import signal
import warnings

import pytest
import torch
from conftest import MAX_WAIT_SECONDS, PROJECT, shell, torchrun
from expected_losses import measure, read_reference, tolerance_ratio
from test_resume import EXIT_STOPPED, job, wait_for_step  # noqa: F401  # job is a fixture

from vgglab import Run
from vgglab.devices.compat import load_tensors
from vgglab.pace import PHASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
CARD = "--device=cuda"


def losses(run):
    return [event["loss"] for event in run.events("train")]


def test_losses_differ_from_the_expected_ones_only_by_rounding():
    measured = measure("vgg11", "cuda")
    assert tolerance_ratio(measured, read_reference()["vgg11"], "float32") <= 1  # TF32 would exceed the tolerance
    assert measured["simulated"] is False


def test_a_plain_run_uses_float32_and_reports_speed_and_memory(train):
    run = train(CARD, "--skip-steps=1").run
    report = run.report()
    assert run.status == "done"
    assert (run.env["device"], run.env["hardware"]) == ("cuda", torch.cuda.get_device_name())
    assert (report["amp_dtype"], report["tf32"], report["simulated"]) == (None, False, False)
    assert report["train_fps_mean"] > 0
    weights = sum(value.nbytes for value in load_tensors(run.checkpoint("last"))["model"].values())
    assert run.events("end")[0]["peak_bytes"] > 3 * weights  # weights, gradients and momentum


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--amp", {"amp_dtype": "float16"}),
        ("--amp-dtype=bfloat16", {"amp_dtype": "bfloat16"}),
        ("--tf32", {"tf32": True}),
        ("--channels-last", {"channels_last": True}),
        ("--fused", {"fused": True}),
        ("--fast", {"amp_dtype": "bfloat16", "channels_last": True, "fused": True}),
        ("--compile", {"compiled": True}),
    ],
)
def test_each_mode_gives_similar_losses_and_is_recorded(train, flag, expected):
    flags = (CARD, "--seed=1", "--print-freq=1", "--dropout-rate=0")
    plain, changed = (train(*flags, *more).run for more in ((), (flag,)))
    assert {name: changed.report()[name] for name in expected} == expected
    assert losses(changed) == pytest.approx(losses(plain), rel=0.05)


def test_the_host_waits_for_the_card_once_per_log_line_not_per_step(train):
    """torch reports each line at which the host waits."""

    def waits(num_epochs):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                flags = ("--print-freq=1000", f"--epochs={num_epochs}", "--eval-freq=1000", "--batch-size=2")
                assert train(CARD, *flags).code == 0
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]

    short, long = waits(2), waits(6)  # 18 and 54 steps, with a log line at the end of each epoch
    assert len(short) > 0
    assert len(long) - len(short) <= 2 * (6 - 2), (short, long)


def test_timers_and_traces_include_the_card(train):
    run = train(CARD, "--timers", "--trace=2", "--epochs=2", "--skip-steps=2", "--print-freq=1", "--tensorboard").run
    seconds = run.report()["phase_seconds"]
    assert list(seconds) == list(PHASES)
    assert seconds["forward"] > 0
    assert seconds["backward"] > 0
    traces = [json.loads(file.read_text()) for file in run.path.rglob("*trace*.json")]
    assert any(event.get("cat") == "kernel" for trace in traces for event in trace["traceEvents"])


def test_a_terminated_run_resumes(job, tmp_path):  # noqa: F811
    flags = [CARD, "--epochs=40"]
    process = job.start("terminated", *flags)
    wait_for_step(tmp_path / "terminated", 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=MAX_WAIT_SECONDS)
    assert process.returncode == EXIT_STOPPED
    stopped_at = Run(tmp_path / "terminated").events("train")[-1]["step"]
    run = job("terminated", *flags, "--resume=auto")
    assert run.status == "done"
    assert run.events("start")[-1]["first_step"] == stopped_at
    assert [event["step"] for event in run.events("train")] == list(range(1, 161))


def test_a_run_with_a_loss_scale_resumes(train):
    first = train(CARD, "--amp").run
    resumed = train(CARD, "--amp", f"--resume={first.path}", "--epochs=2")
    assert resumed.code == 0, resumed.err


def test_more_ranks_than_cards_are_refused(images, tmp_path):
    num_ranks = torch.cuda.device_count() + 1
    args = ["python", *torchrun(num_ranks), "-m", "vgglab.train", CARD, f"--data-path={images}", "--image-size=32"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    result = shell(*args, "--batch-size=2", f"--run-dir={tmp_path / 'run'}", env=environment, cwd=tmp_path)
    assert result.returncode != 0
    line = f"rank {num_ranks - 1} needs card {num_ranks - 1} (counted from 0); cards on this machine: "
    assert line in result.stdout + result.stderr
    assert "Traceback (most recent call last):\n  File" not in result.stdout


def test_a_batch_too_large_for_the_card_is_a_one_line_error(refused):
    flags = (CARD, "--model=vgg16", "--image-size=224", "--batch-size=4096")  # a batch of 192 took 19 GiB on an H200
    line = refused(*flags, data="fake", after_start=True)
    assert line.startswith("--batch-size 4096: out of memory on cuda (")


def test_the_doctor_names_the_card():
    result = shell("python", "-m", "vgglab.doctor")
    assert torch.cuda.get_device_name() in result.stdout + result.stderr, result


def test_bench_step_measures_each_mode(tmp_path):
    flags = "--model vgg11 --image-size 64 --batch-size 64 --turns 2 --json".split()
    modes = ["--ways", "float32,amp,fast", "--against", "torchvision"]
    result = shell("python", "-m", "vgglab.bench", "step", *flags, *modes, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["all"]
    assert [row["way"] for row in rows] == ["float32", "amp", "fast", "torchvision"]
    assert all(row["ratio"] > 0 and row["peak_bytes"] > 0 and 0 < row["share_of_peak"] < 1 for row in rows)
