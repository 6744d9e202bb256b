"""Runs that are stopped within an epoch, killed or out of disk space give the same result when they are resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import processes
import pytest
import torch
from conftest import MAX_WAIT_SECONDS, PROJECT, TINY, torchrun, wait_until
from processes import NARROW_CODE, PYTHONPATH
from test_devices import needs_sim

from vgglab import Run
from vgglab.runs.writer import RankWriter
from vgglab.train import main

pytestmark = pytest.mark.usefixtures("narrow")
EPOCHS, STEPS = 3, 4  # of TINY on 18 images: 4 steps per epoch with 1 rank, 2 with 2
EXIT_STOPPED = 75
JOB = [*TINY[:-1], "--model=vgg11_bn", "--dropout-rate=0.5", f"--epochs={EPOCHS}", "--seed=7", "--print-freq=1"]


@pytest.fixture
def job(images, tmp_path):
    """``job("name", "--flag", ranks=2)`` trains in the run directory ``name``; ``job.start`` starts a new process."""

    def train_args(name, flags):
        return [
            "-m",
            "vgglab.train",
            *JOB,
            "--device=cpu",
            f"--data-path={images}",
            f"--run-dir={tmp_path / name}",
            *flags,
        ]

    def environment(variables):
        return {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **variables}

    def start(name, *flags, ranks=1, restarts=0, **variables):
        launcher = torchrun(ranks, restarts) if ranks > 1 or restarts else []
        return subprocess.Popen(
            [sys.executable, *launcher, *train_args(name, flags)],
            env=environment(variables),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(name, *flags, ranks=1, **variables):
        if ranks == 1 and not variables and "--device=gcu-sim" not in flags:  # can run in this process
            assert main(train_args(name, flags)[2:]) == 0
            return Run(tmp_path / name)
        options = {"env": environment(variables), "cwd": tmp_path}
        if ranks == 1:
            result = processes.python(*train_args(name, flags), **options)
        else:
            result = processes.ranks(ranks, *train_args(name, flags), **options)
        assert result.returncode == 0, result.stderr
        return Run(tmp_path / name)

    def refused(name, *flags, **variables):
        result = processes.python(*train_args(name, flags), env=environment(variables), cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        return result.stdout + result.stderr

    def fork(name, *flags):
        return processes.Child(train_args(name, flags), env=environment({}), cwd=tmp_path)

    run.start, run.fork, run.refused = start, fork, refused
    return run


@pytest.fixture
def inject_code(tmp_path):
    """``inject_code(code)`` returns variables with which a process runs this code at startup."""

    def inject(code):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(NARROW_CODE + code)
        return {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{PROJECT}"}

    return inject


def results_of(run):
    """What must be equal: every loss, and every number in the last checkpoint."""
    events = run.events()
    losses = [(event["step"], event["loss"]) for event in events if event["event"] in ("train", "eval")]
    content = torch.load(run.checkpoint("last"))
    state = content["optimizer"]["state"]
    momenta = [state[key]["momentum_buffer"] for key in sorted(state)]
    return losses, [*content["model"].values(), *momenta], (content["epoch"], content["images"], content["step"])


def assert_same(one, other, after=0):
    (losses, tensors, position), (other_losses, other_tensors, other_position) = results_of(one), results_of(other)
    assert [entry for entry in losses if entry[0] > after] == [entry for entry in other_losses if entry[0] > after]
    assert len(tensors) == len(other_tensors) > 20
    assert all(torch.equal(a, b) for a, b in zip(tensors, other_tensors))
    assert position == other_position


def wait_for_step(path, step):
    def has_reached_step():
        run = Run(path) if (path / "env.json").exists() else None
        assert run is None or run.status != "failed" or run.events("train"), run.logs()
        steps = run.events("train") if run else []
        return steps and steps[-1]["step"] >= step

    wait_until(has_reached_step, every=0.02)


CASES = [(1, 0, "cpu"), (1, 2, "cpu"), (2, 2, "cpu"), (1, 0, "gcu-sim")]


@pytest.mark.parametrize(("ranks", "workers", "device"), [pytest.param(*case, marks=needs_sim) for case in CASES])
def test_row_5_run_resumed_within_an_epoch_equals_an_uninterrupted_run(job, tmp_path, ranks, workers, device):
    flags, options = [f"--workers={workers}", f"--device={device}"], {"ranks": ranks} if ranks > 1 else {}
    uninterrupted = job("uninterrupted", *flags, **options)
    steps_per_epoch = STEPS // ranks
    stop = steps_per_epoch + 1  # after the first step of the second epoch
    stopped = job("stopped", *flags, f"--checkpoint-every={stop}", "--epochs=2", **options)
    middle = stopped.path / "checkpoints" / "previous.pt"
    assert torch.load(middle)["images"] == 4 * ranks
    resumed = job("resumed", *flags, f"--resume={middle}", f"--epochs={EPOCHS}", **options)
    assert resumed.events("start")[-1]["first_step"] == stop
    assert_same(uninterrupted, resumed, after=stop)


@pytest.mark.parametrize(
    ("ranks", "number"), [(1, signal.SIGTERM), (1, signal.SIGUSR1), (1, signal.SIGHUP), (2, signal.SIGTERM)]
)
def test_row_4_termination_signal_saves_a_checkpoint_and_sets_the_exit_code(job, tmp_path, ranks, number):
    if number == signal.SIGTERM:
        process = job.start("signalled", "--epochs=100000", ranks=ranks)
        wait_for_step(tmp_path / "signalled", 3)
        # Like some schedulers: a signal to one of the ranks is enough.
        os.kill(process.pid if ranks == 1 else rank_pids(process.pid)[-1], number)
        output, _ = process.communicate(timeout=MAX_WAIT_SECONDS)
        code = process.returncode
    else:
        process = job.fork("signalled", "--epochs=100000")
        try:
            wait_for_step(tmp_path / "signalled", 3)
            os.kill(process.pid, number)
            code = process.wait()
        finally:
            process.kill()
        result = process.completed()
        output = result.stdout + result.stderr
    name = signal.Signals(number).name
    assert f"stopped by {name}" in output
    assert f"checkpoint saved; continue with --run-dir {tmp_path / 'signalled'} --resume auto" in output
    if ranks == 1:
        assert code == EXIT_STOPPED
    run = Run(tmp_path / "signalled")
    assert run.status == "interrupted"
    content = torch.load(run.checkpoint("last"))
    assert content["step"] == run.events("train")[-1]["step"]


def rank_pids(launcher_pid):
    children = subprocess.run(["ps", "--ppid", str(launcher_pid), "-o", "pid="], capture_output=True, text=True).stdout
    return sorted(int(pid) for pid in children.split())


# Delays a run, so that it does not finish before the test acts on a busy machine.
PAUSE = """
import os, time
import vgglab.dist.interrupts as interrupts
import vgglab.runs.writer as recording
original = recording.RunWriter.event
def event(run, kind, **values):
    original(run, kind, **values)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    while kind == "train" and {steps}[attempt : attempt + 1] == [values["step"]] and not interrupts.stop_requested():
        time.sleep(0.01)
recording.RunWriter.event = event
"""


@pytest.fixture
def pause_at(inject_code):
    """``pause_at(8, 18)`` returns variables that pause the first attempt of a run after step 8, the second after 18."""
    return lambda *steps: inject_code(PAUSE.replace("{steps}", str(list(steps))))


def test_stopped_run_continues_in_place_with_the_same_command(job, pause_at, tmp_path):
    uninterrupted = job("uninterrupted", "--epochs=6")
    process = job.start("same", "--resume=auto", "--epochs=6", **pause_at(20))
    wait_for_step(tmp_path / "same", 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=MAX_WAIT_SECONDS)
    assert process.returncode == EXIT_STOPPED
    stop = Run(tmp_path / "same").events("train")[-1]["step"]
    resumed = job("same", "--resume=auto", "--epochs=6")
    assert resumed.status == "done"
    assert resumed.events("start")[-1]["first_step"] == stop < 24
    assert [event["step"] for event in resumed.events("train")] == list(range(1, 25))
    assert_same(uninterrupted, resumed)


def test_run_restarted_by_torchrun_equals_an_uninterrupted_run(job, pause_at, tmp_path):
    flags = ["--epochs=6", "--checkpoint-every=3"]
    uninterrupted = job("uninterrupted", *flags, ranks=2)
    process = job.start("killed", *flags, ranks=2, restarts=2, **pause_at(5, 10))
    for rank, step in ((1, 3), (0, 7)):  # rank 0 writes the events and checkpoints
        wait_for_step(tmp_path / "killed", step)
        pids = rank_pids(process.pid)
        os.kill(pids[rank], signal.SIGKILL)
        wait_until(lambda pids=pids: len(rank_pids(process.pid)) == 2 and not set(pids) & set(rank_pids(process.pid)))
    output, _ = process.communicate(timeout=MAX_WAIT_SECONDS)
    assert process.returncode == 0, output
    run = Run(tmp_path / "killed")
    assert run.status == "done"
    assert run.failures() == []
    assert_same(uninterrupted, run)


@pytest.mark.paper_widths
@pytest.mark.parametrize("kills", [range(2), pytest.param(range(2, 22), marks=pytest.mark.long)], ids=["two", "many"])
def test_row_3_checkpoints_survive_sigkill(job, tmp_path, kills):
    """Every second kill comes while a checkpoint is being written."""
    uninterrupted = job("uninterrupted")
    draw = random.Random(kills.start)
    for number in kills:
        name = f"killed{number}"
        process = job.start(name, "--checkpoint-every=1", "--resume=auto")
        wait_for_step(tmp_path / name, 1 + draw.randrange(STEPS))
        unfinished = tmp_path / name / "checkpoints" / "unfinished.tmp"
        while number % 2 and not unfinished.exists() and process.poll() is None:
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        assert_same(uninterrupted, job(name, "--checkpoint-every=1", "--resume=auto"))


def test_resume_auto_skips_damaged_checkpoints_with_a_warning(job, tmp_path):
    run = job("run", "--checkpoint-every=3", "--epochs=1")
    last = run.checkpoint("last")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, in the middle of the weights
    last.unlink()  # best.pt may be the same file
    last.write_bytes(content)
    (run.path / "checkpoints" / "best.pt").write_bytes(b"not a checkpoint")
    resumed = job("run", "--resume=auto", "--epochs=1")
    warnings = " ".join(event["text"] for event in resumed.events("warning"))
    assert f"--resume auto: {last} is damaged (the checksum of" in warnings
    assert "so it was not used" in warnings
    assert "best.pt" in warnings
    assert f"resuming from {run.path / 'checkpoints' / 'previous.pt'}" in resumed.logs()
    assert resumed.events("start")[-1]["first_step"] == 3


def test_resume_auto_without_a_run_directory_uses_the_newest_run(job, tmp_path):
    path = job("runs/older", "--epochs=1").path
    job("runs/newer", "--resume=auto", f"--output-dir={tmp_path}", "--epochs=1")
    assert Run(tmp_path / "runs/newer").events("start")[-1]["first_step"] == 0  # with --run-dir, other runs are ignored
    args = ["-m", "vgglab.train", "--resume=auto", f"--output-dir={tmp_path}", "--epochs=2"]
    result = processes.python(*args, env={**os.environ, "PYTHONPATH": str(PROJECT)}, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"resuming from {tmp_path / 'runs/newer'}" in result.stdout
    assert path.exists()


def test_resume_auto_takes_the_last_checkpoint_without_hard_links(job, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    job("copies")
    (tmp_path / "copies" / "checkpoints" / "best.pt").unlink()  # it may equal last.pt
    run = job("copies", "--resume=auto", f"--epochs={EPOCHS + 1}")
    assert run.events("start")[-1]["first_epoch"] == EPOCHS


def test_checkpoints_are_written_where_neither_links_nor_times_can_be_set(job, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "utime", fail)
    job("copies")
    names = ["best.pt", "last.pt", "previous.pt"]
    assert sorted(file.name for file in (tmp_path / "copies/checkpoints").iterdir()) == names


def test_stop_while_a_finished_run_is_only_evaluated_writes_no_checkpoint(job, images, tmp_path, monkeypatch):
    run = job("finished")
    before = {file.name: file.stat() for file in run.path.glob("checkpoints/*")}
    monkeypatch.setattr(RankWriter, "stop_requested", lambda self: True)
    flags = [*JOB, "--device=cpu", f"--data-path={images}", f"--run-dir={run.path}", "--resume=auto"]
    assert main(flags) == EXIT_STOPPED
    assert {file.name: file.stat() for file in run.path.glob("checkpoints/*")} == before


def test_damaged_checkpoint_given_explicitly_is_refused_in_one_line(job, refused):
    last = job("run", "--epochs=1").checkpoint("last")
    content = bytearray(last.read_bytes())
    content[len(content) // 3] ^= 16
    last.write_bytes(content)
    line = refused(f"--resume={last.parent.parent}")
    assert f"--resume {last}: is damaged (the checksum of" in line
    (last.with_name("previous.pt")).write_bytes(b"")
    assert f"the checkpoint before it: --resume {last.with_name('previous.pt')}" in refused(f"--resume={last}")


def test_resume_auto_does_not_overwrite_unusable_checkpoints(job, refused):
    run = job("run", "--epochs=2")
    files = sorted((run.path / "checkpoints").glob("*.pt"))
    assert len(files) > 1
    for file in files:
        file.unlink()
        file.write_bytes(b"damaged")
    line = refused("--resume=auto", f"--run-dir={run.path}")
    assert f"no checkpoint in {run.path} can be used: " in line
    assert all(f"{file} is not a checkpoint" in line for file in files)
    assert f"move {run.path}/checkpoints elsewhere" in line
    assert (run.path / "checkpoints" / "last.pt").read_bytes() == b"damaged"
    assert Run(run.path).status == "done"


def test_row_12_non_finite_loss_stops_the_run_with_a_one_line_error(job, tmp_path):
    output = job.refused("run", "--epochs=3", "--checkpoint-every=1", "--lr=1e30", "--warmup=0", "--model=vgg11")
    assert "Traceback" not in output
    assert "not finite" in output
    assert "lower --lr" in output
    run = Run(tmp_path / "run")
    assert run.status == "failed"
    for file in (run.path / "checkpoints").glob("*.pt"):
        assert all(torch.isfinite(value).all() for value in torch.load(file)["model"].values())
    json.loads((run.path / "report.json").read_text(), parse_constant=pytest.fail)


FULL_DISK = """
import resource, signal
import vgglab.runs.checkpoint as checkpoint
original, saved = checkpoint._write, []
def write(folder, content, is_best):
    saved.append(1)
    size = 1_000_000 if len(saved) in {when} else -1
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))  # larger files fail, as on a full disk
    try:
        original(folder, content, is_best)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
checkpoint._write = write
"""


@pytest.fixture
def full_disk(inject_code):
    """``full_disk(2, 3)`` returns variables with which a run cannot write its second and third checkpoint."""
    return lambda *when: inject_code(FULL_DISK.replace("{when}", str(set(when))))


def test_row_30_full_disk_keeps_the_last_checkpoint_and_the_run_continues(job, full_disk):
    run = job("run", **full_disk(2))
    assert run.status == "done"
    [warning] = [event["text"] for event in run.events("warning") if "not written" in event["text"]]
    assert "step 8" in warning
    assert "the previous checkpoint is intact" in warning
    assert torch.load(run.checkpoint("last"))["step"] == 12
    assert torch.load(run.path / "checkpoints" / "previous.pt")["step"] == 4
    assert not (run.path / "checkpoints" / "unfinished.tmp").exists()


def test_row_30_full_disk_at_the_end_is_an_error_and_the_run_can_resume(job, full_disk, tmp_path):
    output = job.refused("run", **full_disk(3))
    assert "step 12 was not written" in output
    assert "free some disk space (or remount the disk as writable), then continue with " in output
    assert f"--run-dir {tmp_path / 'run'} --resume auto" in output
    assert torch.load(Run(tmp_path / "run").checkpoint("last"))["step"] == 8
    resumed = job("run", "--resume=auto")
    assert torch.load(resumed.checkpoint("last"))["step"] == 12


def test_full_disk_for_all_checkpoints_is_an_error_and_the_run_can_restart(job, full_disk, tmp_path):
    output = job.refused("run", **full_disk(1, 2, 3))
    [error] = [line for line in output.splitlines() if "error: " in line]
    assert "there is no earlier one; free some disk space (or remount the disk as writable), then continue" in error
    assert job("run", "--resume=auto").events("train")[-1]["step"] == 12


def test_run_without_a_checkpoint_restarts_with_its_own_settings(job):
    """The command that an interrupted run suggests trained the default model."""
    run = job("run", "--epochs=1", "--lr=0.03")
    before = dict(run.config)
    shutil.rmtree(run.path / "checkpoints")
    assert main([f"--run-dir={run.path}", "--resume=auto", "--device=cpu", "--workers=0"]) == 0
    after = Run(run.path).config
    names = ("model", "epochs", "lr", "batch_size", "data_path", "seed", "dropout_rate", "image_size", "num_classes")
    assert [after[name] for name in names] == [before[name] for name in names]


def test_resuming_with_more_ranks_uses_each_image_once(job):
    """The position in the data is saved as a number of images: two ranks can resume a checkpoint of one rank."""
    flags = ["--epochs=1", "--checkpoint-every=2"]
    middle = job("one", *flags, "--training-step-per-epoch=3").path / "checkpoints" / "previous.pt"
    resumed = job("two", *flags, "--training-step-per-epoch=2", f"--resume={middle}", ranks=2)
    assert "--resume: --nproc 2, was 1" in [event["text"] for event in resumed.events("warning")]
    # 8 of 16 images had been used, and a step of two ranks uses 8.
    assert [event["step"] for event in resumed.events("train")] == [3]
