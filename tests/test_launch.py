"""vgglab.launch: runs can be followed and stopped, and leave no processes behind."""

import fcntl
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MAX_WAIT_SECONDS, TINY, shell, wait_until
from processes import NARROW_CODE, Child, python

import vgglab
from vgglab.runs.run import is_run_dir

pytestmark = pytest.mark.usefixtures("narrow", "forked")
MARK = f"VGGLAB_TEST_MARK_{os.getpid()}"  # differs from that of other test runs on this machine


def processes_with(mark):
    """Process ids of all live processes with this mark in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment.split(b"\0") and state != "Z":
            found.append(int(entry.name))
    return found


@pytest.fixture
def tiny(images, tmp_path):
    return [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}"]


def test_wait_returns_the_finished_run(tiny):
    run = vgglab.launch(tiny, epochs=2, print_freq=1, nesterov=True, watch=False)
    assert run.wait(MAX_WAIT_SECONDS) is run
    assert (run.status, run.config["epochs"], run.config["nesterov"]) == ("done", 2, True)
    assert run.report()["acc1"] is not None
    assert "held-out images" in run.logs()
    assert len([line for line in run.logs().splitlines() if line.startswith("run directory")]) == 1


def test_launch_in_a_script_prints_and_blocks(tiny, capsys):
    run = vgglab.launch(" ".join(tiny))
    assert run.process.poll() == 0
    assert "top-1" in capsys.readouterr().out


def test_invalid_flag_fails_at_once_without_a_run(tiny, tmp_path):
    with pytest.raises(vgglab.UserError, match="--epochs: '0'"):
        vgglab.launch(tiny, epochs=0)
    with pytest.raises(vgglab.UserError, match=r"--modle: no such flag; did you mean --model\?"):
        vgglab.launch(tiny, modle="vgg11")
    assert not (tmp_path / "runs").exists()


def test_settings_are_passed_to_the_run_unchanged(tiny, tmp_path):
    run = vgglab.launch([*tiny, "--epochs", 2], resume=None, run_dir=tmp_path / "with space", watch=False).wait(
        MAX_WAIT_SECONDS
    )
    assert (run.config["epochs"], run.config["resume"]) == (2, None)
    with pytest.raises(vgglab.UserError, match=r"--run-dir .*with space: already contains a run"):
        vgglab.launch(tiny, run_dir=tmp_path / "with space")


def test_input_error_in_the_run_reaches_the_caller_and_launch_leaks_no_file_descriptors(tiny):
    gc.collect()  # those of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    run = vgglab.launch(tiny, num_classes=7, watch=False)
    with pytest.raises(vgglab.UserError, match=r"--num-classes 7: .* has 3 classes"):
        run.wait(MAX_WAIT_SECONDS)
    assert len(os.listdir("/proc/self/fd")) == before


def test_bug_reaches_the_caller_with_its_traceback(tiny, monkeypatch, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        NARROW_CODE + "import vgglab.settings.schedule as s\n"
        "def learning_rate(*_): raise ZeroDivisionError('injected')\n"
        "s.learning_rate = learning_rate\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    run = vgglab.launch(tiny, watch=False)
    with pytest.raises(vgglab.RunFailed, match=r"(?s)exit code 1.*Traceback.*injected"):
        run.wait(MAX_WAIT_SECONDS)
    assert run.status == "failed"


def test_hanging_run_is_killed_at_once_without_a_grace_period(tiny, monkeypatch):
    monkeypatch.setenv(MARK, "no-grace")
    run = vgglab.launch(tiny, epochs=100_000, watch=False)
    wait_until(lambda: run.events("train"))
    os.kill(run.process.pid, signal.SIGSTOP)
    monkeypatch.setenv("VGGLAB_GRACE_SECONDS", "0")
    try:
        vgglab.Run(run.path).stop()
        assert processes_with("no-grace") == []
    finally:
        run.process.kill()


def test_stop_ends_the_run_and_its_workers(tiny, monkeypatch):
    monkeypatch.setenv(MARK, "stop")
    run = vgglab.launch(tiny, epochs=100_000, workers=2, watch=False)
    wait_until(lambda: run.events("checkpoint"))
    assert len(processes_with("stop")) >= 3
    run.stop()
    assert processes_with("stop") == []
    assert run.status == "interrupted"
    assert run.wait() is run  # a stopped run is not a failed run
    assert run.checkpoint("last").exists()
    run.stop()  # stopping again has no effect


@pytest.mark.paper_widths  # so that a checkpoint takes long to write
@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)])
def test_stop_while_saving_waits_for_the_checkpoint(tiny, times):
    """torch.save turns Ctrl-C into a RuntimeError, so the run had the status failed."""
    for _ in range(times):
        run = vgglab.launch(tiny, epochs=100_000, watch=False)
        unfinished = run.path / "checkpoints" / "unfinished.tmp"
        wait_until(unfinished.exists, every=0.001)
        run.stop()
        assert run.status == "interrupted"
        assert sorted(file.name for file in unfinished.parent.iterdir()) == ["best.pt", "last.pt", "previous.pt"]


DELAYS = [0.002 * number for number in range(10)]


@pytest.mark.paper_widths  # the delays are for forks of such a process
@pytest.mark.parametrize("delays", [[0, 0.008], pytest.param(DELAYS, marks=pytest.mark.long)], ids=["some", "many"])
def test_stop_while_workers_are_forked_is_not_lost(tiny, delays):
    """The signal arrived in one of Python's fork hooks and was lost: the run continued until it was killed."""
    for delay_seconds in delays:
        run = vgglab.launch(
            tiny, epochs=100_000, workers=2, batch_size=1, training_step_per_epoch=1, eval_step_per_epoch=1, watch=False
        )
        wait_until(lambda run=run: run.events("eval_start"), every=0.001)
        time.sleep(delay_seconds)
        run.stop()
        assert run.events("end"), run.logs()
        assert run.status == "interrupted"


@pytest.mark.parametrize("seconds", [0, 0.5, 2])
def test_stop_during_startup_is_not_a_failure(tiny, seconds):
    run = vgglab.launch(tiny, epochs=100_000, watch=False)
    time.sleep(seconds)
    run.stop()
    assert run.status == "interrupted"
    assert run.wait() is run


LAUNCHER = """
import sys, time, vgglab
run = vgglab.launch(sys.argv[1:], epochs=100_000, workers=2, watch=False)
print(run.path, flush=True)
time.sleep(600)
"""


def start_launcher(tiny, mark, code=LAUNCHER):
    environment = {**os.environ, MARK: mark}
    command = [sys.executable, "-c", code, *tiny]
    return subprocess.Popen(
        command, env=environment, preexec_fn=no_core_dump, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_run_ends_with_the_process_that_launched_it(tiny, number):
    mark = f"dies-{number}"
    launcher = start_launcher(tiny, mark)
    run = vgglab.Run(launcher.stdout.readline().strip())
    wait_until(lambda: run.events("eval"))
    launcher.send_signal(number)
    launcher.communicate(timeout=MAX_WAIT_SECONDS)
    wait_until(lambda: not processes_with(mark))
    assert run.status == "interrupted"


def no_core_dump():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def group_exists(pgid):
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.new_interpreters
def test_ctrl_backslash_ends_run_and_workers_and_the_run_can_resume(images, tmp_path):
    """The terminal sends SIGQUIT to all processes of its foreground group, and none of them cleans up."""
    flags = [*TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}", "--resume=auto", "--workers=2"]
    process = Child(["-m", "vgglab.train", *flags, "--epochs=100000"], preexec_fn=no_core_dump)
    wait_until(lambda: is_run_dir(tmp_path / "run") and vgglab.Run(tmp_path / "run").events("checkpoint"))
    os.killpg(process.pid, signal.SIGQUIT)
    assert process.wait() == -signal.SIGQUIT
    wait_until(lambda: not group_exists(process.pid))
    run = vgglab.Run(tmp_path / "run")
    assert run.status == "failed"
    saved = run.events("checkpoint")[-1]
    assert python("-m", "vgglab.train", *flags, f"--epochs={saved['epoch'] + 1}").returncode == 0
    assert run.events("start")[-1]["first_step"] == saved["step"]


def test_run_ends_if_its_launching_process_dies_early(tiny):
    """Even before the run has imported torch."""
    environment = {**os.environ, MARK: "early"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *tiny], env=environment, stdout=subprocess.PIPE, text=True
    )
    launcher.stdout.readline()
    launcher.kill()
    launcher.communicate(timeout=MAX_WAIT_SECONDS)
    wait_until(lambda: not processes_with("early"))


def test_ctrl_c_during_wait_stops_the_run(tiny):
    launcher = start_launcher(tiny, "wait", code=LAUNCHER.replace("time.sleep(600)", "run.wait()"))
    run = vgglab.Run(launcher.stdout.readline().strip())
    wait_until(lambda: run.events("eval"))
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=MAX_WAIT_SECONDS)
    assert "KeyboardInterrupt" in errors
    assert processes_with("wait") == []
    assert run.status == "interrupted"


def test_ctrl_c_ends_only_the_watching_of_a_run_started_elsewhere(tiny):
    run = vgglab.launch(tiny, epochs=100_000, watch=False)
    try:
        wait_until(lambda: run.events("train"))
        code = f"import vgglab; vgglab.Run({str(run.path)!r}).watch()"
        watcher = subprocess.Popen(
            [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        watcher.stdout.readline()
        watcher.send_signal(signal.SIGINT)
        _, errors = watcher.communicate(timeout=MAX_WAIT_SECONDS)
        assert "KeyboardInterrupt" in errors
        assert run.status == "running"
        step = run.events("train")[-1]["step"]
        wait_until(lambda: run.events("train")[-1]["step"] > step + 2)
    finally:
        run.stop()


def test_importing_the_package_imports_neither_torch_nor_matplotlib():
    code = "import sys, vgglab; vgglab.launch; print(sorted({'torch', 'matplotlib', 'IPython'} & set(sys.modules)))"
    assert shell("python", "-c", code).stdout.strip() == "[]"


def test_second_writer_is_refused_in_one_line_and_the_first_continues(tiny, tmp_path):
    flags = [*tiny, f"--run-dir={tmp_path / 'run'}", "--resume=auto"]
    run = vgglab.launch(flags, epochs=100_000, watch=False)
    with pytest.raises(vgglab.UserError, match=f"run_dir .*run: process {run.process.pid} on .* is writing there; "):
        vgglab.launch(flags, epochs=100_000, watch=False)  # the same cell again, during startup
    wait_until(lambda: run.events("checkpoint"))
    with pytest.raises(vgglab.UserError, match="is writing there"):
        vgglab.launch(flags, epochs=100_000, watch=False)
    second = python("-m", "vgglab.train", *flags, "--epochs=100000")
    assert (second.returncode, second.stderr.count("\n")) == (2, 1), second.stderr
    assert f"run: process {run.process.pid} on " in second.stderr
    step = run.events("train")[-1]["step"]
    wait_until(lambda: run.events("train")[-1]["step"] > step)
    os.kill(run.process.pid, signal.SIGKILL)  # the lock is released when its owner dies
    run.process.wait()
    restarted = vgglab.launch(flags, epochs=100_000, watch=False)
    wait_until(lambda: restarted.events("checkpoint"))
    restarted.stop()
    assert restarted.status == "interrupted"


def test_launching_twice_does_not_affect_the_first_run(tiny, tmp_path):
    run = vgglab.launch(tiny, run_dir=tmp_path / "run", epochs=100_000, watch=False)
    with pytest.raises(vgglab.UserError, match="is writing there"):
        vgglab.launch(tiny, run_dir=tmp_path / "run", epochs=100_000, watch=False)
    wait_until(lambda: run.events("checkpoint"))
    assert json.loads((run.path / "launch.json").read_text())["pid"] == run.process.pid
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    vgglab.Run(tmp_path / "alias").stop()  # by a symbolic link to the same folder
    run.process.wait(1)
    assert run.status == "interrupted"


def test_folder_locked_by_another_process_does_not_block_launch(tiny, tmp_path, monkeypatch):
    """Every user who can read a folder can lock it; the launch then waited forever."""
    monkeypatch.setattr("vgglab.storage.lock.MAX_WAIT_SECONDS", 0.2)
    (tmp_path / "run" / "log").mkdir(parents=True)
    descriptor = os.open(tmp_path / "run" / "log", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(vgglab.UserError, match="another process has locked this folder"):
            vgglab.launch(tiny, run_dir=tmp_path / "run", watch=False)
    finally:
        os.close(descriptor)


def test_status_does_not_depend_on_the_clock(tiny, monkeypatch):
    launched, true_time = vgglab.launch(tiny, epochs=100_000, watch=False), time.time
    wait_until(lambda: launched.events("checkpoint"))
    run = vgglab.Run(launched.path)
    for hours in (1000, -1000):
        monkeypatch.setattr(time, "time", lambda hours=hours: true_time() + 3600 * hours)
        assert run.status == "running"
    message = run.stop()
    assert message == f"{run.name}: process {launched.process.pid} was asked to save and stop; status: interrupted"
    assert "already ended" in run.stop()
    launched.process.wait(1)  # at most its threads are still ending
    assert run.status == "interrupted"
