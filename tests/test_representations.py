"""Runs, reports, plans and comparisons in a notebook: their metrics as escaped HTML and as text. Status and stop."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import PROJECT

from vgglab import Run, UserError
from vgglab.dist.processes import identity
from vgglab.lab.plan import plan_training
from vgglab.runs.compare import compare_runs
from vgglab.runs.report import build_report
from vgglab.runs.run import LAUNCH_FILE
from vgglab.settings.parser import parse_flags
from vgglab.storage.files import inode_of
from vgglab.storage.lock import Lock
from vgglab.storage.schema import append_line, write_document

ODD = "<b>lab & co</b>"
ESCAPED = "&lt;b&gt;lab &amp; co&lt;/b&gt;"


@pytest.fixture
def run(train, tmp_path):
    path = tmp_path / "<i>runs" / "one"
    assert train("--print-freq=1", "--skip-steps=0", f"--run-dir={path}").code == 0
    return Run(path)


def replace_in(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_run_is_displayed_with_its_metrics(run):
    report, page = run.report(), run._repr_html_()
    for value in ("done", "vgg11", f"{report['acc1']:.2f}", f"{report['images_per_second']:,.1f} images/s"):
        assert f">{value}</td>" in page
    assert "&lt;i&gt;runs/one" in page
    assert "<i>" not in page
    assert repr(run) == f"Run({str(run.path)!r})  # done"


def test_a_run_on_a_simulated_card_is_displayed_without_speed(run):
    replace_in(run.path / "env.json", '"simulated": false', '"simulated": true')
    page = run._repr_html_()
    assert "not measured (a simulated card has no speed)" in page
    assert "images/s" not in page


def test_a_starting_run_is_displayed(tmp_path):
    (tmp_path / "launch.json").write_text('{"host": "elsewhere", "pid": 1}')
    page = Run(tmp_path)._repr_html_()
    assert ">starting</td>" in page
    assert str(tmp_path) in page


def test_a_report_is_also_a_dict(run):
    report = run.report()
    plain = build_report(run)
    assert type(plain) is dict
    assert report == plain
    assert json.dumps(report) == json.dumps(plain)
    assert {**report} == plain


def test_a_report_shows_every_metric(run):
    replace_in(run.path / "env.json", '"hardware": ', f'"hardware": "{ODD}", "was": ')
    report = run.report()
    text, page = repr(report), report._repr_html_()
    for name in report:
        assert f"\n{name} " in f"\n{text}"
        assert f">{name}</th>" in page
    assert f"{report['images_per_second']:.6g}" in text
    assert f">{report['images_per_second']:.6g}</td>" in page
    assert ODD in text
    assert ESCAPED in page
    assert ODD not in page
    assert "{" not in text


def test_a_plan_is_displayed_as_a_table():
    planned = plan_training(parse_flags(["--recipe=seed"]), images_per_second=590.0, ranks=8)
    for shown in (repr(planned), planned._repr_html_()):
        assert f"{planned.steps:,} with {planned.global_batch_size} images" in shown
        assert "at 4,720 images/s on 8 cards" in shown
        assert "Plan(" not in shown
    assert "<th style='text-align:left'>steps</th>" in planned._repr_html_()
    page = planned._replace(data=ODD)._repr_html_()
    assert ESCAPED in page
    assert ODD not in page


def test_a_comparison_is_displayed_as_a_list(run, train):
    other = train("--print-freq=1", "--skip-steps=0", "--lr=0.02").run
    found = compare_runs(run, other)
    assert "first difference: " in repr(found)
    assert "lr 0.01 vs. 0.02" in repr(found)
    assert "Comparison(" not in repr(found)


@pytest.mark.parametrize("content", [b"{", b"", b"3", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "env.json"])
def test_a_damaged_run_is_still_listed_in_the_table(run, name, content):
    from vgglab.view.summaries import runs_table

    (run.path / name).write_bytes(content)
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))  # as if it were still running
    table = repr(runs_table([run]))
    assert run.name in table
    assert run.name in run._repr_html_()
    assert run.name in repr(run)


def test_accuracy_on_generated_images_is_labelled_as_such(train):
    from vgglab.view.live import progress_of, summary
    from vgglab.view.summaries import runs_table

    run = train("--eval-step-per-epoch=1", "--training-step-per-epoch=2", data="fake").run
    assert "(generated images)" in run._repr_html_()
    assert "(generated images)" in repr(runs_table([run]))
    assert "% of generated images" in summary(run, progress_of(run))
    write_document(run.path / "config.json", {**run.config, "data_path": "noise"})
    run = Run(run.path)
    assert run.config["data_path"] == "noise"
    assert "% of generated images" in summary(run, progress_of(run))  # it used to know only the name "fake"


@pytest.mark.parametrize("age_seconds", [3600, 0], ids=["old", "just copied"])
def test_stop_does_not_end_a_process_with_the_pid_of_a_killed_run(run, age_seconds):
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))  # killed, so without an end event
    unrelated = subprocess.Popen(["sleep", "60"])
    try:
        env = json.loads((run.path / "env.json").read_text())
        (run.path / "env.json").write_text(json.dumps({**env, "pid": unrelated.pid}))
        os.utime(run.path / "env.json", (time.time() - age_seconds,) * 2)
        assert Run(run.path).status == "failed"
        Run(run.path).stop()
        assert unrelated.poll() is None
    finally:
        unrelated.kill()
        unrelated.wait()


@pytest.mark.parametrize("pid", [-1, 0, 1, True, "12", None, 10**30])
def test_stop_sends_no_signal_to_a_pid_from_a_foreign_run_directory(run, monkeypatch, pid):
    """-1 means all processes."""
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))
    env = json.loads((run.path / "env.json").read_text())
    start = identity(1)["process"] if pid in (1, True) else env["process"]
    (run.path / "env.json").write_text(json.dumps({**env, "pid": pid, "process": start}))
    sent = []
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    with contextlib.suppress(UserError):
        Run(run.path).stop()
    assert [args for args in sent if args[1] != 0] == []


def test_a_copy_of_an_active_run_is_not_active(run):
    """It used to be shown as running for as long as the original run was active."""
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))
    write_document(run.path / "env.json", {**run.env, **identity(os.getpid())})  # a live process that holds no lock
    assert Run(run.path).status == "failed"


def test_a_copy_of_a_launched_run_is_not_active(run, tmp_path):
    """It used to be shown as running for as long as the process that had launched the original was alive."""
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))
    launcher = {**identity(os.getpid()), "inode": inode_of(run.path)}
    write_document(run.path / LAUNCH_FILE, {**launcher, "argv": [], "command": []})
    assert Run(run.path).status == "running"
    assert Run(run.path.rename(tmp_path / "renamed")).status == "running"
    assert Run(shutil.copytree(tmp_path / "renamed", tmp_path / "copied")).status == "failed"


HOLD_LOCK = """
import sys, time
from pathlib import Path
from vgglab.storage.files import inode_of
from vgglab.storage.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_held_outside_the_container_is_not_free(tmp_path):
    """Linux reports no process for it, so an active run would be shown as failed."""
    unshare = ["unshare", "--pid", "--fork"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs permission to create a process namespace")
    code = (
        "import sys; from pathlib import Path; from vgglab.storage.lock import holder; print(holder(Path(sys.argv[1])))"
    )
    lock = Lock(tmp_path / "lock")
    command = [*unshare, sys.executable, "-c", code, tmp_path / "lock"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    lock.close()
    assert result.stdout == "None\n", result.stderr


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_stop_does_not_end_a_process_whose_lock_is_linked_into_a_run(run, tmp_path, link):
    """Stopping a copy with such a link used to end the original run."""
    (run.path / "lock").unlink()
    (tmp_path / "lock").touch()
    link(tmp_path / "lock", run.path / "lock")
    args = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "lock")]
    lock_owner = subprocess.Popen(args, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    try:
        assert lock_owner.stdout.readline() == b"held\n"
        events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
        (run.path / "events.jsonl").write_text("".join(events[:-1]))
        write_document(run.path / "env.json", {**run.env, **identity(lock_owner.pid)})
        with pytest.raises(UserError, match="cannot confirm"):
            Run(run.path).stop()
        assert lock_owner.poll() is None
    finally:
        lock_owner.kill()
        lock_owner.communicate()


@pytest.fixture
def unrelated(tmp_path):
    """An unrelated process of the same user; its output goes to a file."""
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(["sleep", "600"], stdout=output)
    yield process
    process.kill()
    process.wait()


def test_stop_does_not_end_a_process_named_in_a_foreign_run_directory(run, unrelated):
    """Everything that identifies a process can be read from /proc by anyone, but only the run itself holds its lock."""
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))
    write_document(run.path / "env.json", {**run.env, **identity(unrelated.pid)})
    assert Run(run.path).stop().endswith("already ended; status: failed")
    for name in ("launch.json", "env.json"):
        write_document(run.path / name, {**run.env, **identity(unrelated.pid), "command": [], "argv": []})
    with pytest.raises(UserError, match=r"cannot confirm that process [0-9]+ on .* belongs to this run"):
        Run(run.path).stop()
    assert unrelated.poll() is None


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "deleted output"])
def test_stacks_are_not_requested_from_a_process_of_a_foreign_run(run, unrelated, tmp_path, kind):
    """The request is a signal, which ends a process that has no handler for it."""
    log = run.path / "log" / "rank0.txt"
    log.unlink()
    if kind == "symbolic link":
        log.symlink_to(tmp_path / "output.txt")
    else:
        os.link(tmp_path / "output.txt", log)
    if kind == "deleted output":
        (tmp_path / "output.txt").unlink()
    (run.path / "log" / "rank0.jsonl").unlink()
    metrics = {"rank": 0, "pid": unrelated.pid, "time": 1, "step": 1, "loss": 1.0, "interval_steps": 1}
    append_line(run.path / "log" / "rank0.jsonl", {**metrics, "own_seconds": 1, "interval_seconds": 1})
    assert "not running" in Run(run.path).stacks()
    assert unrelated.poll() is None


@pytest.mark.parametrize("line", ["5", '"x"', "[1]", "null", '{"a": 1}', '{"event": "train"}', "\x00\x01"])
def test_a_line_that_is_not_an_event_changes_nothing(run, line):
    report = run.report()
    assert report.pop("damage") == []
    checksum = report.pop("events_checksum")
    before = (report, run.status, run.events(), run.ranks(), run.skipped())
    for file in [run.path / "events.jsonl", *run.path.glob("log/*.jsonl")]:
        file.write_text(f"{line}\n{file.read_text()}{line}\n")
    reread = Run(run.path)
    report = reread.report()
    damaged = [f"{name}: 2 damaged lines, left out" for name in ("events.jsonl", "log/rank*.jsonl")]
    assert report.pop("damage") == damaged
    assert report.pop("events_checksum") != checksum
    assert (report, reread.status, reread.events(), reread.ranks(), reread.skipped()) == before
