"""Several ranks: results do not depend on their number, and failures of a rank are reported."""

import json
import os
import shutil
import signal
import socket
import sys
from functools import partial

import processes
import pytest
from conftest import MAX_WAIT_SECONDS, PROJECT, TINY, shell, torchrun, wait_until
from expected_losses import BEFORE
from processes import NARROW_CODE, PYTHONPATH
from test_devices import needs_sim, run_ranks
from test_launch import MARK, processes_with

import vgglab
from vgglab import Run
from vgglab.dist.processes import request_stack
from vgglab.dist.slurm import adopt_slurm_environment, first_host
from vgglab.errors import UserError
from vgglab.view.live import progress_of, summary
from vgglab.view.rank_table import rank_table, stall_warning

pytestmark = pytest.mark.usefixtures("narrow", "forked")
FAULT = """
import os, sys
import vgglab.pace as pace
original, steps = pace.Clock.end_own_work, []
def end_own_work(clock):
    steps.append(1)
    if os.environ.get("RANK") == "{rank}" and len(steps) >= 2:
        {action}
    original(clock)
pace.Clock.end_own_work = end_own_work
"""
RAISE = "raise ZeroDivisionError('injected')"
KILL_SELF = "os.kill(os.getpid(), 9)"
HANG = "__import__('time').sleep(600)"
SLOW_DOWN = "__import__('time').sleep(2)"  # many times the duration of such a step on a busy machine


@pytest.fixture
def inject_fault(tmp_path):
    """``inject_fault(action)`` returns variables with which a rank does this in each step from its second one."""

    def inject(action, rank=1):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(NARROW_CODE + FAULT.format(action=action, rank=rank))
        return {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{PROJECT}", "OMP_NUM_THREADS": "1"}

    return inject


@pytest.fixture
def tiny(images, tmp_path):
    return [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--print-freq=1", "--seed=1"]


def test_row_8_accuracy_is_identical_on_1_2_and_3_ranks(images, tmp_path):
    """Neither 2 nor 3 ranks divide the 11 held-out images, and no image is counted twice."""
    for source, copy in (("n01/n01_0.JPEG", "n01/more.JPEG"), ("n02/n02_1.JPEG", "n02/more.JPEG")):
        shutil.copy(images / "val" / source, images / "val" / copy)
    saved = run_ranks(tmp_path, images, "cpu", 1).checkpoint("last")
    results = []
    for num_ranks in (1, 2, 3):
        run = run_ranks(tmp_path, images, "cpu", num_ranks, "--test-only", f"--resume={saved}")
        [event] = run.events("eval")
        results.append((event["acc1"], event["acc5"], event["num_images"]))
    assert results[0] == results[1] == results[2]
    assert results[0][2] == 11


@pytest.mark.parametrize("model", ["vgg11", "vgg11_bn"])
def test_one_and_two_ranks_agree_with_the_same_global_batch(images, tmp_path, model):
    flags = [f"--model={model}", "--epochs=2", "--lr=0.01", "--dropout-rate=0", "--sync-bn"]
    # In float64: with batch norm, rounding errors of float32 grow to about 1e-4 in a few steps, depending on the CPU.
    one = run_ranks(tmp_path, images, "cpu", 1, *flags, "--batch-size=8", before=BEFORE["float64"])
    two = run_ranks(tmp_path, images, "cpu", 2, *flags, "--batch-size=4", before=BEFORE["float64"])
    losses, other = ([event["loss"] for event in run.events("train")] for run in (one, two))
    assert len(losses) == len(other) == 4
    assert losses == pytest.approx(other, rel=1e-10)
    held_out, other = ([event["loss"] for event in run.events("eval")] for run in (one, two))
    assert held_out == pytest.approx(other, rel=1e-10)


WEIGHTS_DIFFER = "the weights of the ranks differ: an update differed between ranks; rank 0's weights are saved"
# As a setting would that adds noise after the gradients have been averaged: the seed of a step depends on the rank.
RECORD_TIMES = """
import os, time
import vgglab.pace as pace
import vgglab.runs.writer as writer
restart, save = pace.Clock.restart, writer.RunWriter.save_checkpoint
def record(name):
    with open(os.environ["TIMES"] + name, "a") as file:
        print(time.monotonic(), file=file)  # the same clock in all processes
def recorded_restart(clock):
    restart(clock)
    record(os.environ["RANK"])
def slow_save(*args):
    time.sleep(0.2)
    save(*args)
    record("saved")
pace.Clock.restart, writer.RunWriter.save_checkpoint = recorded_restart, slow_save
"""


def test_all_ranks_exclude_the_time_for_saving(images, tmp_path):
    """Only rank 0 did, so that the table of ranks showed it as the fastest."""
    files = tmp_path / "times-"
    flags = ("--epochs=1", "--checkpoint-every=1")
    run = run_ranks(tmp_path, images, "cpu", 2, *flags, before=RECORD_TIMES, TIMES=str(files))
    num_steps = run.events("train")[-1]["step"]
    saved, restarted = (
        [float(line) for line in (tmp_path / f"times-{name}").read_text().split()] for name in ("saved", "1")
    )
    after_saving = restarted[3::2]  # after two at the start, each step has one before and one after saving
    assert len(after_saving) == num_steps > 1
    assert all(later > earlier for later, earlier in zip(after_saving, saved))


ADD_NOISE = """
import torch
from vgglab.devices.base import Device
original = Device.average_gradients
def average_gradients(device, model):
    original(device, model)
    weight = next(model.parameters())
    weight.grad += 1e-6 * torch.randn_like(weight)
Device.average_gradients = average_gradients
"""


def test_ranks_whose_weights_differ_are_reported(images, tmp_path):
    run = run_ranks(tmp_path, images, "cpu", 2, "--epochs=2", before=ADD_NOISE)
    assert [event["text"] for event in run.events("warning")].count(WEIGHTS_DIFFER) == 1  # not at each evaluation


@needs_sim
def test_sync_batch_norm_on_the_simulated_card_matches_the_cpu(images, tmp_path):
    flags = ["--model=vgg11_bn", "--sync-bn"]
    on_cpu, on_sim = (run_ranks(tmp_path, images, device, 2, *flags) for device in ("cpu", "gcu-sim"))
    losses, other = ([event["loss"] for event in run.events("train")] for run in (on_cpu, on_sim))
    assert losses == other
    assert not [event for run in (on_cpu, on_sim) for event in run.events("warning") if event["text"] == WEIGHTS_DIFFER]


def test_row_19_one_rank_writes_events_and_each_has_its_own_log(images, tmp_path):
    run = run_ranks(tmp_path, images, "cpu", 2)
    assert sorted(file.name for file in (run.path / "log").iterdir()) == [
        "rank0.jsonl", "rank0.txt", "rank1.jsonl", "rank1.txt",
    ]  # fmt: skip
    assert [row["rank"] for row in run.ranks()] == [0, 1]
    last = run.events("train")[-1]
    assert all(row["step"] == last["step"] for row in run.ranks())
    assert sum(row["loss"] for row in run.ranks()) / 2 == pytest.approx(last["loss"], rel=1e-5)
    assert len(run.events("start")) == 1
    assert run.logs(1) == ""


def test_ranks_over_gloo_exit_without_running_pythons_shutdown(tiny, inject_fault, tmp_path):
    """During Python's shutdown, a thread that gloo had left running sometimes aborted a successful run."""
    environment = {**os.environ, **inject_fault("__import__('atexit').register(print, 'atexit ran')", rank=0)}
    one = shell("python", "-m", "vgglab.train", *tiny, env={**environment, "RANK": "0"}, cwd=tmp_path)
    two = shell("python", *torchrun(2), "-m", "vgglab.train", *tiny, env=environment, cwd=tmp_path)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert "atexit ran" in one.stdout
    assert "report.json" in two.stdout
    assert "atexit ran" not in two.stdout


def test_failed_rank_is_named_with_its_own_traceback(tiny, inject_fault, tmp_path):
    result = processes.ranks(2, "-m", "vgglab.train", *tiny, env={**os.environ, **inject_fault(RAISE)}, cwd=tmp_path)
    assert result.returncode == 1
    assert "vgglab.train: rank 1 of 2: failed:" in result.stderr
    assert "ZeroDivisionError: injected" in result.stderr
    assert result.stderr.count("vgglab.train: rank 0 of 2: another rank has gone") <= 1
    [run] = tmp_path.glob("runs/*")
    cause = Run(run).failures()[0]
    assert (cause["rank"], cause["error"]) == (1, "ZeroDivisionError: injected")
    assert "ZeroDivisionError" in Run(run).logs(1)


def test_wait_raises_with_the_traceback_of_the_failed_rank(tiny, inject_fault, monkeypatch):
    for name, value in inject_fault(RAISE).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(MARK, "raises")
    run = vgglab.launch(tiny, nproc=2, watch=False)
    with pytest.raises(vgglab.RunFailed, match=r"(?s)rank 1 failed\nTraceback.*end_own_work.*injected"):
        run.wait(MAX_WAIT_SECONDS)
    assert processes_with("raises") == []


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 has a log without a stack trace
def test_wait_names_the_killed_rank(tiny, inject_fault, monkeypatch, rank):
    for name, value in inject_fault(KILL_SELF, rank).items():
        monkeypatch.setenv(name, value)
    run = vgglab.launch(tiny, nproc=2, watch=False)
    with pytest.raises(
        vgglab.RunFailed, match=rf"rank {rank} was killed \(SIGKILL\); if you did not kill it yourself, .*memory$"
    ):
        run.wait(MAX_WAIT_SECONDS)


def test_hanging_rank_is_detected_and_stopped(tiny, inject_fault, monkeypatch):
    for name, value in inject_fault(HANG).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(MARK, "hangs")
    run = vgglab.launch(tiny, nproc=2, watch=False)
    wait_until(lambda: run.events("train"))
    monkeypatch.setattr("vgglab.view.rank_table.STALL_SECONDS", 1)
    wait_until(lambda: stall_warning(run))  # after ten times the duration of a step
    monkeypatch.setattr("vgglab.runs.run.request_stack", partial(request_stack, seconds=MAX_WAIT_SECONDS))
    assert "run.stacks()" in summary(run, progress_of(run))
    rank0, rank1 = run.stacks().split("rank 1:")
    assert "end_own_work" in rank1
    assert "end_own_work" not in rank0
    assert "backward" in rank0  # where it waits for the gradients of rank 1
    assert run.status == "running"
    run.stop(grace_seconds=2)
    assert processes_with("hangs") == []
    assert run.status == "interrupted"


def test_straggler_is_marked(tiny, inject_fault, tmp_path):
    environment = {**os.environ, **inject_fault(SLOW_DOWN)}
    words = ["-m", "vgglab.train", *tiny, "--epochs=2", f"--run-dir={tmp_path / 'run'}"]
    result = processes.ranks(2, *words, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = Run(tmp_path / "run")
    table = rank_table(run)
    rank0, rank1 = (dict(zip(table.headings, row)) for row in table.rows)
    assert (rank0[""], table.bold_rows) == ("", [1])
    assert float(rank1["time before sync"].split()[0]) > 1000  # ms of 2 s of sleep, in all steps but the first
    assert float(rank0["images/s"]) > 0
    assert float(rank0["peak memory"].split()[0]) > 0
    assert "wait for this rank" in repr(table).splitlines()[2]
    assert "wait for this rank</th>" in table._repr_html_()
    assert "no rank" not in run.stacks()  # both have exited; no other process is signalled
    assert run.stacks().count("not running") == 2


def test_input_error_on_all_ranks_reaches_the_caller_in_one_line(tiny):
    with pytest.raises(UserError, match=r"^--num-classes 7: .* has 3 classes"):
        vgglab.launch(tiny, nproc=2, num_classes=7, watch=False).wait(MAX_WAIT_SECONDS)


def test_stop_saves_a_checkpoint_and_ends_all_ranks(tiny, monkeypatch):
    monkeypatch.setenv(MARK, "stopped")
    run = vgglab.launch(tiny, nproc=2, epochs=100_000, workers=1, watch=False)
    wait_until(lambda: len(run.events("train")) > 3)
    assert len(processes_with("stopped")) >= 5  # the launcher and two ranks with a worker each
    run.stop(grace_seconds=MAX_WAIT_SECONDS)  # writing the checkpoint may take long on a slow disk
    assert processes_with("stopped") == []
    assert run.status == "interrupted"
    assert run.events("checkpoint")[-1]["step"] == run.events("train")[-1]["step"]
    assert run.wait() is run


SIGTERM_AT_START = """
import os, signal
import torch.utils.data._utils.worker as worker
def set_handlers():
    original()
    os.kill(os.getpid(), signal.SIGTERM)
original = worker.signal_handling._set_worker_signal_handlers
worker.signal_handling._set_worker_signal_handlers = set_handlers
"""


def test_sigterm_does_not_end_a_starting_worker(tiny, tmp_path):
    """torchrun sends SIGTERM to whole process groups; it killed such a worker, and the run failed."""
    (tmp_path / "sitecustomize.py").write_text(SIGTERM_AT_START)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    result = processes.python("-m", "vgglab.train", *tiny, "--workers=1", env=environment, cwd=tmp_path)
    assert (result.returncode, "exited unexpectedly" in result.stderr) == (0, False), result.stderr


def launcher_pid(run):
    return json.loads((run.path / "launch.json").read_text())["pid"]


@pytest.mark.parametrize("early", [True, False], ids=["during-startup", "while-training"])
def test_killed_launcher_leaves_no_ranks(tiny, monkeypatch, early):
    monkeypatch.setenv(MARK, f"launcher-{early}")
    run = vgglab.launch(tiny, nproc=2, epochs=100_000, workers=1, watch=False)
    if early:
        wait_until(lambda: len(processes_with(f"launcher-{early}")) >= 3, every=0.01)
    else:
        wait_until(lambda: run.events("train"))
    os.kill(launcher_pid(run), signal.SIGKILL)
    with pytest.raises(vgglab.RunFailed):
        run.wait(MAX_WAIT_SECONDS)
    wait_until(lambda: not processes_with(f"launcher-{early}"))


LAUNCHER = """
import sys, time, vgglab
run = vgglab.launch(sys.argv[2:], nproc=2, epochs=100_000, workers=1, watch=False, detach=sys.argv[1] == "detached")
print(run.path, flush=True)
time.sleep(600)
"""


def start_launcher(tiny, mark, mode):
    from subprocess import PIPE, Popen

    command = [sys.executable, "-c", LAUNCHER, mode, *tiny]
    return Popen(command, env={**os.environ, MARK: mark, "PYTHONPATH": PYTHONPATH}, stdout=PIPE, text=True)


# The other signals are in the long suite only; tests/test_launch.py tests each with one rank.
OTHER_SIGNALS = [pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGKILL, *OTHER_SIGNALS])
def test_ranks_end_with_the_process_that_launched_them(tiny, number):
    mark = f"ranks-{number}"
    launcher = start_launcher(tiny, mark, "attached")
    run = Run(launcher.stdout.readline().strip())
    wait_until(lambda: run.events("train"))
    launcher.send_signal(number)
    launcher.communicate(timeout=MAX_WAIT_SECONDS)
    wait_until(lambda: not processes_with(mark))


def test_detached_run_outlives_its_launching_process_and_can_be_stopped(tiny):
    launcher = start_launcher(tiny, "detached", "detached")
    run = Run(launcher.stdout.readline().strip())
    wait_until(lambda: run.events("train"))
    launcher.kill()
    launcher.communicate(timeout=MAX_WAIT_SECONDS)
    step = run.events("train")[-1]["step"]
    wait_until(lambda: run.events("train")[-1]["step"] > step + 3)
    found = Run(run.path)
    assert found.status == "running"
    found.stop()
    assert processes_with("detached") == []
    assert found.status == "interrupted"


@pytest.mark.new_interpreters
def test_two_nodes_train_one_model(tiny, images, tmp_path, monkeypatch):
    """Two launchers on one machine stand for two nodes; a torch.py in the current directory is ignored."""
    single_node = run_ranks(tmp_path, images, "cpu", 2)
    (tmp_path / "torch.py").write_text("raise SystemExit('wrong torch')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    args = [*tiny, f"--run-dir={tmp_path / 'run'}", "--batch-size=2"]
    nodes = [vgglab.launch(args, watch=False, nnodes=2, node_rank=rank, rendezvous=rendezvous) for rank in (0, 1)]
    for node in nodes:
        node.wait(MAX_WAIT_SECONDS)
    run = Run(tmp_path / "run")
    assert [event["loss"] for event in run.events("train")] == [event["loss"] for event in single_node.events("train")]
    assert run.report()["world_size"] == 2


SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "4711",
    "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[003-004]",
}  # fmt: skip


def test_row_21_slurm_tasks_become_ranks():
    environment = dict(SLURM)
    adopt_slurm_environment(environment)
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu003"}
    assert expected.items() <= environment.items()
    assert environment["MASTER_PORT"] == "19711"
    # Under torchrun, with one task, and in the shell of an allocation.
    for other in ({**SLURM, "RANK": "0"}, {**SLURM, "SLURM_NTASKS": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}):
        before = dict(other)
        adopt_slurm_environment(other)
        assert other == before


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-007,9],cpu1", "gpu003"), ("a-[7,9]", "a-7")]
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first


def test_row_21_srun_with_two_tasks_runs_two_ranks(tiny, tmp_path):
    common = {
        **os.environ, "PYTHONPATH": str(PROJECT), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    args = ["-m", "vgglab.train", *tiny, f"--run-dir={tmp_path / 'run'}", "--batch-size=2"]
    tasks = [
        processes.Child(args, env={**common, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
        for task in range(2)
    ]
    try:
        assert [task.wait() for task in tasks] == [0, 0], [task.completed() for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert Run(tmp_path / "run").report()["world_size"] == 2


@pytest.mark.parametrize("bad", [{"nproc": 0}, {"nproc": "two"}, {"nnodes": 2}, {"python": "/no/such/python"}])
def test_invalid_launch_arguments_are_refused(tiny, bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        vgglab.launch(tiny, watch=False, **bad)
