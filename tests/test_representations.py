"""What a cell shows of a run, a report, a plan and a comparison: the figures, escaped, and in plain text too."""

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


def rewrite(file, before, after):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_a_run_is_a_card(run):
    report, card = run.report(), run._repr_html_()
    for figure in ("done", "vgg11", f"{report['acc1']:.2f}", f"{report['images_per_second']:,.1f} images/s"):
        assert f">{figure}</td>" in card
    assert "&lt;i&gt;runs/one" in card
    assert "<i>" not in card
    assert repr(run) == f"Run({str(run.path)!r})  # done"


def test_the_card_of_a_simulated_card_has_no_speed(run):
    rewrite(run.path / "env.json", '"simulated": false', '"simulated": true')
    card = run._repr_html_()
    assert "simulated card, no speed" in card
    assert "images/s" not in card


def test_a_run_that_has_only_begun_has_a_card(tmp_path):
    (tmp_path / "launch.json").write_text('{"host": "elsewhere", "pid": 1}')
    card = Run(tmp_path)._repr_html_()
    assert ">starting</td>" in card
    assert str(tmp_path) in card


def test_a_report_stays_a_dict(run):
    report = run.report()
    plain = build_report(run)
    assert type(plain) is dict
    assert report == plain
    assert json.dumps(report) == json.dumps(plain)
    assert {**report} == plain


def test_a_report_shows_every_figure(run):
    rewrite(run.path / "env.json", '"hardware": ', f'"hardware": "{ODD}", "was": ')
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


def test_a_plan_is_a_table():
    planned = plan_training(parse_flags(["--recipe=seed"]), images_per_second=590.0, ranks=8)
    for shown in (repr(planned), planned._repr_html_()):
        assert f"{planned.steps:,} with {planned.global_batch_size} images" in shown
        assert "on 8 cards at 4,720 images/s" in shown
        assert "Plan(" not in shown
    assert "<th style='text-align:left'>steps</th>" in planned._repr_html_()
    page = planned._replace(data=ODD)._repr_html_()
    assert ESCAPED in page
    assert ODD not in page


def test_a_comparison_is_a_list(run, train):
    other = train("--print-freq=1", "--skip-steps=0", "--lr=0.02").run
    found = compare_runs(run, other)
    assert "first difference: " in repr(found)
    assert "lr 0.01 and 0.02" in repr(found)
    assert "Comparison(" not in repr(found)


@pytest.mark.parametrize("content", [b"{", b"", b"3", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "env.json"])
def test_a_damaged_run_stands_in_the_table_and_takes_no_other_along(run, name, content):
    from vgglab.view.summaries import runs_table

    (run.path / name).write_bytes(content)
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))  # as if it were still going on
    table = repr(runs_table([run]))
    assert run.name in table
    assert run.name in run._repr_html_()
    assert run.name in repr(run)


def test_the_accuracy_of_made_up_images_says_so(train):
    from vgglab.view.live import progress_of, summary
    from vgglab.view.summaries import runs_table

    run = train("--eval-step-per-epoch=1", "--training-step-per-epoch=2", data="fake").run
    assert "of generated images" in run._repr_html_()
    assert "of generated images" in repr(runs_table([run]))
    assert "% of generated images" in summary(run, progress_of(run))


@pytest.mark.parametrize("age_seconds", [3600, 0], ids=["left behind", "copied just now"])
def test_another_process_with_the_number_of_a_run_that_was_killed_is_left_alone(run, age_seconds):
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))  # killed: it never said how it ended
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        env = json.loads((run.path / "env.json").read_text())
        (run.path / "env.json").write_text(json.dumps({**env, "pid": stranger.pid}))
        os.utime(run.path / "env.json", (time.time() - age_seconds,) * 2)
        assert Run(run.path).status == "failed"
        Run(run.path).stop()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("pid", [-1, 0, 1, True, "12", None, 10**30])
def test_no_number_in_a_foreign_run_directory_makes_stop_send_a_signal(run, monkeypatch, pid):
    """-1 stands for every process there is."""
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))
    env = json.loads((run.path / "env.json").read_text())
    began = identity(1)["process"] if pid in (1, True) else env["process"]
    (run.path / "env.json").write_text(json.dumps({**env, "pid": pid, "process": began}))
    sent = []
    monkeypatch.setattr(os, "kill", lambda *words: sent.append(words))
    with contextlib.suppress(UserError):
        Run(run.path).stop()
    assert [words for words in sent if words[1] != 0] == []


def test_a_copy_of_an_active_run_is_not_active(run):
    """It said that it runs, for as long as the run that it was copied from."""
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))
    write_document(run.path / "env.json", {**run.env, **identity(os.getpid())})  # a process that lives, without a lock
    assert Run(run.path).status == "failed"


def test_a_copy_of_a_launched_run_is_not_active(run, tmp_path):
    """It said that it runs, for as long as the process that had launched the original."""
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))
    launcher = {**identity(os.getpid()), "inode": inode_of(run.path)}
    write_document(run.path / LAUNCH_FILE, {**launcher, "argv": [], "command": []})
    assert Run(run.path).status == "running"
    assert Run(run.path.rename(tmp_path / "renamed")).status == "running"
    assert Run(shutil.copytree(tmp_path / "renamed", tmp_path / "copied")).status == "failed"


LOCKS = """
import sys, time
from pathlib import Path
from vgglab.storage.files import inode_of
from vgglab.storage.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_that_is_held_outside_the_container_is_not_free(tmp_path):
    """Linux names no process there, and a run that is active would have failed."""
    unshare = ["unshare", "--pid", "--fork"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a process namespace")
    code = (
        "import sys; from pathlib import Path; from vgglab.storage.lock import holder; print(holder(Path(sys.argv[1])))"
    )
    lock = Lock(tmp_path / "lock")
    asked = [*unshare, sys.executable, "-c", code, tmp_path / "lock"]
    answer = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    lock.close()
    assert answer.stdout == "None\n", answer.stderr


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_run_whose_lock_is_another_name_for_someone_elses_does_not_stop_him(run, tmp_path, link):
    """A copy with such a link ended the run that it was copied from."""
    (run.path / "lock").unlink()
    (tmp_path / "lock").touch()
    link(tmp_path / "lock", run.path / "lock")
    words = [sys.executable, "-c", LOCKS, str(tmp_path / "lock")]
    victim = subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    try:
        assert victim.stdout.readline() == b"held\n"
        events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
        (run.path / "events.jsonl").write_text("".join(events[:-1]))
        write_document(run.path / "env.json", {**run.env, **identity(victim.pid)})
        with pytest.raises(UserError, match="cannot confirm"):
            Run(run.path).stop()
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.communicate()


@pytest.fixture
def stranger(tmp_path):
    """Another process of ours; its output goes to a file."""
    with (tmp_path / "its.txt").open("w") as output:
        process = subprocess.Popen(["sleep", "600"], stdout=output)
    yield process
    process.kill()
    process.wait()


def test_who_is_named_in_a_foreign_run_directory_is_not_stopped(run, stranger):
    """All that names a process can be read from /proc by everybody; only the run itself holds its lock."""
    events = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(events[:-1]))
    write_document(run.path / "env.json", {**run.env, **identity(stranger.pid)})
    assert Run(run.path).stop().endswith("it had already ended; failed")
    for name in ("launch.json", "env.json"):
        write_document(run.path / name, {**run.env, **identity(stranger.pid), "command": [], "argv": []})
    with pytest.raises(UserError, match=r"cannot confirm that process [0-9]+ on .* belongs to this run"):
        Run(run.path).stop()
    assert stranger.poll() is None


@pytest.mark.parametrize("kind", ["a link", "the same file", "a file of the name"])
def test_who_is_named_in_a_foreign_run_directory_is_not_asked_where_it_is(run, stranger, tmp_path, kind):
    """The question is a signal that ends a process without a handler."""
    log = run.path / "log" / "rank0.txt"
    log.unlink()
    if kind == "a link":
        log.symlink_to(tmp_path / "its.txt")
    else:
        os.link(tmp_path / "its.txt", log)
    if kind == "a file of the name":
        (tmp_path / "its.txt").unlink()
    (run.path / "log" / "rank0.jsonl").unlink()
    figures = {"rank": 0, "pid": stranger.pid, "time": 1, "step": 1, "loss": 1.0, "interval_steps": 1}
    append_line(run.path / "log" / "rank0.jsonl", {**figures, "own_seconds": 1, "interval_seconds": 1})
    assert "not running" in Run(run.path).stacks()
    assert stranger.poll() is None


@pytest.mark.parametrize("line", ["5", '"x"', "[1]", "null", '{"a": 1}', '{"event": "train"}', "\x00\x01"])
def test_a_line_that_is_no_event_changes_nothing(run, line):
    report = run.report()
    assert report.pop("damage") == []
    checksum = report.pop("events_checksum")
    before = (report, run.status, run.events(), run.ranks(), run.skipped())
    for file in [run.path / "events.jsonl", *run.path.glob("log/*.jsonl")]:
        file.write_text(f"{line}\n{file.read_text()}{line}\n")
    again = Run(run.path)
    report = again.report()
    damaged = [f"{name}: 2 damaged lines, left out" for name in ("events.jsonl", "log/rank*.jsonl")]
    assert report.pop("damage") == damaged
    assert report.pop("events_checksum") != checksum
    assert (report, again.status, again.events(), again.ranks(), again.skipped()) == before
