"""Runs on a full or read-only disk, and run directories that contain links or pipes."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import PROJECT, TINY, wait_until
from processes import Child, python

import vgglab
from vgglab import Run, UserError
from vgglab.dist.processes import find_processes
from vgglab.runs import checkpoint
from vgglab.runs.run import ACTIVE, is_run_dir

BLOCK = 4096


@contextlib.contextmanager
def mounted(folder, size):
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs permission to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def disk(tmp_path):
    """A separate disk that is small enough to fill."""
    with mounted(tmp_path / "disk", "250m") as folder:
        yield folder


def fill(folder, num_blocks_left=0):
    with open(folder / "filler", "ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(64 * BLOCK))
    os.truncate(folder / "filler", max(0, (folder / "filler").stat().st_size - num_blocks_left * BLOCK))


def run_training(*flags):
    result = python("-m", "vgglab.train", *TINY, "--print-freq=1", *flags)
    assert "Traceback" not in result.stdout + result.stderr
    return result


@pytest.fixture
def resume_flags(images, disk, tmp_path):
    """Flags that resume a run on the small disk whose checkpoints are on another disk."""
    flags = [f"--data-path={images}", f"--run-dir={disk / 'run'}", "--resume=auto"]
    assert run_training(*flags).returncode == 0
    shutil.move(disk / "run" / "checkpoints", tmp_path / "checkpoints")
    (disk / "run" / "checkpoints").symlink_to(tmp_path / "checkpoints")
    return flags


def test_full_disk_loses_log_lines_but_training_finishes(resume_flags, disk):
    fill(disk, num_blocks_left=1)
    scalars = ["--tensorboard"] if find_spec("tensorboard") else []
    result = run_training(*resume_flags, "--epochs=9", "--eval-freq=100", *scalars)
    assert result.returncode == 2
    [error] = [line for line in result.stderr.splitlines() if "error:" in line]
    assert re.search("training finished; not written: .*[0-9]+ lines of events", error)
    assert f"python -m vgglab.report {disk / 'run'}" in error
    assert result.stdout.count("events.jsonl cannot be written (No space left on device)") == 1
    assert result.stdout.count("scalars cannot be written") == len(scalars)
    assert "epoch 9 of 9" in result.stdout
    assert Run(disk / "run").status not in ACTIVE
    os.remove(disk / "filler")
    assert run_training(*resume_flags, "--epochs=10").returncode == 0
    assert (Run(disk / "run").status, Run(disk / "run").events("start")[-1]["first_epoch"]) == ("done", 9)


@pytest.mark.usefixtures("narrow")
def test_best_weights_that_could_not_be_saved_are_named(train, monkeypatch):
    """Later checkpoints of worse evaluations do not replace them: ``best.pt`` does not reach the report's accuracy."""
    save, failures = checkpoint.save, iter([checkpoint.SaveError("No space left on device")])

    def save_later(*args):
        for failure in failures:
            raise failure
        save(*args)

    monkeypatch.setattr(checkpoint, "save", save_later)
    result = train("--epochs=2", "--lr=1e-9")
    assert result.code == 0
    warnings = result.run.report()["warnings"]
    assert "best.pt does not contain the weights of step 4, the best evaluation so far" in warnings
    assert result.run.checkpoint("last").exists()


def test_unwritable_log_is_named_in_the_last_line(images, tmp_path):
    """The printed lines were silently lost."""
    with mounted(tmp_path / "run" / "log", f"{BLOCK}"):
        result = run_training(
            f"--data-path={images}", f"--run-dir={tmp_path / 'run'}", "--epochs=40", "--eval-freq=100"
        )
    assert (result.returncode, Run(tmp_path / "run").status) == (2, "done")
    assert re.search("not written: .*[0-9]+ lines of log/rank0.txt", result.stderr)
    assert "epoch 40 of 40" in result.stdout


@pytest.fixture
def disk_and_remount(tmp_path):
    """A separate disk, and a function that makes it read-only with files open, as Linux does after an I/O error."""
    folder, image = tmp_path / "disk", tmp_path / "disk.img"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(800 * 2**20)
    mount = ["mount", "-o", "loop,errors=remount-ro", image, folder]
    if shutil.which("mkfs.ext4") is None or subprocess.run(["mkfs.ext4", "-q", image]).returncode:
        pytest.skip("needs mkfs.ext4")
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs permission to mount a disk")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,abort", folder], check=True)
    subprocess.run(["umount", "--lazy", folder], check=True)


WAIT_AFTER_CHECKPOINT = """
import os, time
import vgglab.runs.writer as writer
original = writer.RunWriter.event
def event(run, kind, **values):
    original(run, kind, **values)
    while kind == "checkpoint" and not os.path.exists({file!r}):
        time.sleep(0.01)
writer.RunWriter.event = event
"""


@pytest.mark.usefixtures("narrow")
def test_read_only_disk_gives_one_error_that_lists_what_is_missing(images, disk_and_remount, tmp_path):
    disk, make_read_only = disk_and_remount
    (tmp_path / "sitecustomize.py").write_text(WAIT_AFTER_CHECKPOINT.format(file=str(tmp_path / "aborted")))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    words = ["-m", "vgglab.train", *TINY, f"--data-path={images}", f"--run-dir={disk / 'run'}", "--epochs=3"]
    process = Child([*words, "--print-freq=1"], env=environment)
    wait_until(lambda: is_run_dir(disk / "run") and Run(disk / "run").events("checkpoint"))
    make_read_only()
    (tmp_path / "aborted").touch()
    process.wait()
    result = process.completed()
    assert (result.returncode, "Traceback" in result.stdout + result.stderr) == (2, False)
    assert result.stdout.count("events.jsonl cannot be written (Read-only file system)") == 1
    assert "epoch 3 of 3" in result.stdout
    [error] = [line for line in result.stderr.splitlines() if "error: " in line]
    assert re.search(
        r"checkpoint of step [0-9]+ was not written .*; the previous checkpoint is intact; also not written: ", error
    )
    assert re.search(r"lines of events.jsonl.*report.json; free some disk space .* continue with --run-dir", error)
    assert Run(disk / "run").status == "failed"


def test_full_disk_at_startup_is_an_error_and_nothing_hangs(images, disk):
    for num_blocks in (0, 1, 2):
        fill(disk, num_blocks)
        run_dir = disk / f"run{num_blocks}"
        result = run_training(f"--data-path={images}", f"--run-dir={run_dir}")
        assert (result.returncode, result.stderr.count("error:")) == (2, 1)
        assert str(run_dir) in result.stderr
        if num_blocks and is_run_dir(run_dir):  # there was space for its first lines
            assert Run(run_dir).status == "failed"
            Run(run_dir).watch()  # returns
            continue
        os.remove(disk / "filler")
        assert run_training(f"--data-path={images}", f"--run-dir={run_dir}").returncode == 0  # the same command
        shutil.rmtree(run_dir)


def test_launch_on_a_full_disk_fails_and_leaves_no_process(images, disk):
    for num_blocks in (0, 1, 2, 3):
        fill(disk, num_blocks)
        path = disk / f"run{num_blocks}"
        with pytest.raises(UserError, match=str(path)):
            vgglab.launch([*TINY, f"--data-path={images}", f"--run-dir={path}"], watch=False).wait()
        assert find_processes(path) == []
        assert not is_run_dir(path) or Run(path).status == "failed"


WRITTEN_FILES = ("events.jsonl", "lock", "config.tmp", "env.tmp", "report.tmp", "log/rank0.txt", "log/rank0.jsonl",
                 "checkpoints/unfinished.tmp")  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", WRITTEN_FILES)
def test_link_or_pipe_in_place_of_a_written_file_is_rejected(images, train, tmp_path, name, kind):
    """In a run directory that others can write to: link targets are not changed, and pipes do not block."""
    path = train().run.path
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with contextlib.suppress(FileNotFoundError):
        (path / name).unlink()
    (path / name).symlink_to(victim) if kind == "link" else os.mkfifo(path / name)
    result = run_training(f"--data-path={images}", f"--run-dir={path}", "--resume=auto", "--epochs=2")
    assert victim.read_text() == "precious"
    assert re.search("is a link|is a pipe|is not a regular file|holds no run", result.stdout + result.stderr)
    assert result.returncode == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to act as another user")
@pytest.mark.parametrize("name", ["log", "checkpoints"])
def test_folder_linked_by_another_user_is_not_written_to(images, tmp_path, name):
    path, victim = tmp_path / "run", tmp_path / "victim"
    victim.mkdir()
    path.mkdir()
    (path / name).symlink_to(victim)
    os.chown(path / name, 65534, 65534, follow_symlinks=False)
    result = run_training(f"--data-path={images}", f"--run-dir={path}")
    assert result.returncode == 2
    assert list(victim.iterdir()) == []


def test_dangling_link_is_found_before_training(images, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "checkpoints").symlink_to(tmp_path / "nowhere")
    result = run_training(f"--data-path={images}", f"--run-dir={path}")
    assert (result.returncode, "epoch 1" in result.stdout) == (2, False)
