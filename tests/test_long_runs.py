"""A run of a million events is not held in memory when it is read, with the same results as for a short run."""

import contextlib
import json
import os
import shutil
import sys
import time

import pytest
from test_runs import START, path, trained  # noqa: F401  # path is a fixture

import vgglab
from vgglab.commands import call
from vgglab.runs.compare import compare_runs
from vgglab.runs.run import Run
from vgglab.storage import events
from vgglab.storage.schema import with_checksum
from vgglab.view.live import _TerminalLines, progress_of, summary

NUM_PARSED = 5
EVALUATED = {
    "event": "eval", "seconds": 30, "step": 30, "epoch": 0, "acc1": 50.0, "acc5": 90.0, "loss": 1.0, "num_images": 9,
}  # fmt: skip
RESTART = {**START, "seconds": 60, "first_epoch": 1, "first_step": 30}
SECOND_RESTART = {**RESTART, "first_step": 45}
END = {"event": "end", "seconds": 99, "status": "done", "error": None}


def training(first, last, **more):
    order = ("event", "seconds", "epoch", "step")  # as written by the trainer
    rows = [trained(step, loss=1 / step, step_seconds=[0.4, 0.6], **more) for step in range(first, last)]
    return [{**{name: row[name] for name in order}, **row} for row in rows]


def write(folder, *rows, first=0):
    with (folder / "events.jsonl").open("a") as file:
        for number, row in enumerate(rows, first):
            file.write(json.dumps(with_checksum({**row, "line": number})) + "\n")


def read(folder, monkeypatch, is_long):
    monkeypatch.setattr(events, "MAX_PARSED", NUM_PARSED if is_long else 20_000)
    run = vgglab.Run(folder)
    assert isinstance(run.events("train"), events.LongEvents) == is_long
    return run


HISTORIES = {
    "completed": [START, *training(1, 31), EVALUATED, *training(31, 61), END],
    "resumed": [START, *training(1, 31), EVALUATED, *training(31, 41), END, RESTART, *training(31, 51), END],
    "resumed twice": [START, *training(1, 41), RESTART, *training(31, 51), SECOND_RESTART, *training(46, 61)],
    "with timers": [START, *training(1, 41, phase_seconds={"data": 0.5, "forward": 1.0}, host_reads={"a.py:3": 2})],
}


@pytest.mark.parametrize("history", HISTORIES)
def test_long_run_reads_like_a_short_one(history, path, monkeypatch):  # noqa: F811
    write(path, *HISTORIES[history])
    short, long = (read(path, monkeypatch, is_long) for is_long in (False, True))
    for kind in (None, "start", "train", "eval", "end"):
        assert list(long.events(kind)) == list(short.events(kind))
    train = short.events("train")
    assert (len(long.events("train")), long.events("train")[-1]) == (len(train), train[-1])
    assert list(long.events("train")[3::7]) == train[3::7]
    assert long.report() == short.report()
    assert (long.status, long.num_lines(), long.damage()) == (short.status, short.num_lines(), short.damage())
    assert summary(long, progress_of(long)) == summary(short, progress_of(short))
    assert compare_runs(short, long).is_same


def test_new_lines_are_read_exactly_once(path, monkeypatch):  # noqa: F811
    write(path, START, *training(1, 31))
    run = read(path, monkeypatch, is_long=True)
    before = run.events("train")
    write(path, *training(31, 41), first=31)
    assert [event["step"] for event in run.events("train")] == [*range(1, 41)]
    assert len(before) == 30
    assert progress_of(run).step == 40


@pytest.mark.parametrize("index", [0, 3, 12, 20, 40])
def test_each_flipped_bit_is_detected(index, path, monkeypatch):  # noqa: F811
    write(path, START, *training(1, 41))
    content = bytearray((path / "events.jsonl").read_bytes())
    lines = content.split(b"\n")
    start = sum(len(line) + 1 for line in lines[:index])
    for offset in range(0, len(lines[index]), 7):
        for bit in (0, 4):
            changed = bytearray(content)
            changed[start + offset] ^= 1 << bit
            if b"\n" in changed[start : start + len(lines[index])]:
                continue  # splits the line in two, which the tests of short runs cover
            (path / "events.jsonl").write_bytes(changed)
            run = read(path, monkeypatch, is_long=True)
            assert "events.jsonl: 1 damaged line, left out" in run.damage()
            assert len(run.events()) == 40


def test_missing_line_is_counted(path, monkeypatch):  # noqa: F811
    write(path, START, *training(1, 41))
    lines = (path / "events.jsonl").read_text().splitlines(keepends=True)
    (path / "events.jsonl").write_text("".join(lines[:20] + lines[21:]))
    assert "events.jsonl: 1 line missing" in read(path, monkeypatch, is_long=True).damage()


def test_file_modified_while_being_read_is_an_error(path, monkeypatch):  # noqa: F811
    write(path, START, *training(1, 41))
    run = read(path, monkeypatch, is_long=True)
    train = run.events("train")
    text = (path / "events.jsonl").read_text()
    (path / "events.jsonl").write_text(text.replace('"lr": 0.1', '"lr": 0.2'))
    with pytest.raises(vgglab.UserError, match=r"events\.jsonl: was changed while it was being read"):
        list(train)


def test_modified_report_is_recomputed(path, monkeypatch):  # noqa: F811
    write(path, *HISTORIES["completed"])
    report = vgglab.Run(path).report()
    assert report["damage"] == []
    saved = {**report, "acc1": 99.0}

    def acc1(content):
        (path / "report.json").write_text(json.dumps(content))
        return vgglab.Run(path).report()["acc1"]

    assert acc1(with_checksum(saved)) == 99.0  # intact and computed from these events
    assert acc1({**with_checksum(report), "acc1": 99.0}) == 50.0
    assert acc1(with_checksum({**saved, "peak_bytes": "<b>"})) == 50.0
    assert acc1(with_checksum({**saved, "status": "running"})) == 50.0
    assert acc1(with_checksum({name: value for name, value in saved.items() if name != "warnings"})) == 50.0
    (path / "report.json").write_text(json.dumps(with_checksum(saved)))
    assert call("report", [str(path)]) == 0
    assert json.loads((path / "report.json").read_text())["acc1"] == 50.0
    write(path, *training(61, 62), first=len(HISTORIES["completed"]))
    assert acc1(with_checksum(saved)) == 50.0


def test_file_replaced_between_two_reads_is_another_run(path, monkeypatch):  # noqa: F811
    """Its lines were mistaken for those of the first run: metrics of both were mixed, and no damage was reported."""
    write(path, *HISTORIES["completed"])
    run = read(path, monkeypatch, is_long=True)
    train = run.events("train")
    (path / "events.jsonl").rename(path / "before.jsonl")
    write(path, START, *training(1, 31, acc1=77.0), EVALUATED, *training(31, 61, acc1=77.0), END)
    with pytest.raises(vgglab.UserError, match=r"events\.jsonl: was replaced while it was being read"):
        list(train)
    assert {event["acc1"] for event in run.events("train")} == {77.0}
    shutil.rmtree(path)
    with pytest.raises(vgglab.UserError, match="cannot be read"):
        list(train)
    assert run.status == "failed"


def test_report_is_invalid_if_the_run_ends_meanwhile(path, monkeypatch):  # noqa: F811
    """The checksum covered more events than had been read, and the report counted as valid."""
    write(path, START, *training(1, 31))
    original = Run.events_checksum

    def end_the_run(run):
        checksum = original(run)
        monkeypatch.undo()
        write(path, EVALUATED, *training(31, 41), END, first=31)
        return checksum

    monkeypatch.setattr(Run, "events_checksum", end_the_run)
    assert call("report", [str(path)]) == 0
    assert vgglab.Run(path).valid_report() is None
    assert vgglab.Run(path).report()["acc1"] == 50.0


@pytest.mark.parametrize(("name", "change"), [("env.json", {"simulated": True}), ("config.json", {"batch_size": 64})])
def test_report_is_recomputed_for_other_settings_or_another_machine(name, change, path):  # noqa: F811
    write(path, *HISTORIES["completed"])
    assert call("report", [str(path)]) == 0
    assert vgglab.Run(path).report()["images_per_second"] is not None
    content = json.loads((path / name).read_text())
    content.pop("check")
    (path / name).write_text(json.dumps(with_checksum({**content, **change})))
    assert vgglab.Run(path).report()["images_per_second"] is None


def test_file_of_a_different_size_is_not_read_for_comparison(path):  # noqa: F811
    write(path, *HISTORIES["completed"])
    assert call("report", [str(path)]) == 0
    os.truncate(path / "events.jsonl", 2**40)  # a sparse file, which takes no disk space
    assert "is larger than 1 GiB" in " ".join(vgglab.Run(path).damage())


def test_report_without_events_is_not_used(path):  # noqa: F811
    write(path, *HISTORIES["completed"])
    saved = {**vgglab.Run(path).report(), "events_checksum": ""}
    (path / "report.json").write_text(json.dumps(with_checksum(saved)))
    (path / "events.jsonl").unlink()
    (path / "launch.json").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(vgglab.UserError, match="nothing to report yet"):
        vgglab.Run(path).report()


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": "x"}, {"interval_seconds": -1}, {"epoch": 10**20}, {"host_reads": {"a": 2}}, {"host_reads": 3},
        {"interval_seconds": 5e-324}, {"step": 50}, {"event": "end", "status": "done", "error": None},
    ],
)  # fmt: skip
def test_invalid_event_causes_no_traceback(changed, path, monkeypatch):  # noqa: F811
    rows = [START, *training(1, 41), END]
    write(path, *rows[:20], {**rows[20], **changed}, *rows[21:])
    for is_long in (False, True):
        monkeypatch.setattr(events, "MAX_PARSED", NUM_PARSED if is_long else 20_000)
        run = vgglab.Run(path)
        for show in (repr, vgglab.Run.report, lambda run: summary(run, progress_of(run)), lambda run: [*run.events()]):
            with contextlib.suppress(vgglab.UserError):
                show(run)
        assert run.status == "done"


def test_too_many_start_events_are_reported(path):  # noqa: F811
    write(path, *[START] * 3000)
    assert "has more than 1000 start events" in " ".join(vgglab.Run(path).damage())


def test_terminal_shows_each_event_once(path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(events, "MAX_PARSED", NUM_PARSED)
    write(path, START, *training(1, 4))
    run = vgglab.Run(path)
    lines = _TerminalLines(run)
    lines.update()
    write(path, *training(4, 9), first=4)
    capsys.readouterr()
    shown = []
    monkeypatch.setattr(lines, "terminal", shown.append)
    lines.update()
    assert [event["step"] for event in shown] == [4, 5, 6, 7, 8]


def test_valid_report_is_read_once_and_again_after_each_change(path):  # noqa: F811
    """A table of 200 runs asks six times for each; all files were read each time."""
    write(path, *HISTORIES["completed"])
    assert call("report", [str(path)]) == 0
    run, file, opened = vgglab.Run(path), path / "events.jsonl", []
    content = file.read_bytes()
    sys.addaudithook(lambda name, args: opened.append(1) if name == "open" and str(args[0]) == str(file) else None)

    def reads_and_is_valid():
        opened.clear()
        is_valid = run.valid_report() is not None
        return bool(opened), is_valid

    def write_events(content):
        """Write ten seconds ago, as far as the files show."""
        file.write_bytes(content)
        for changed in path.glob("*.json*"):
            os.utime(changed, (ten_seconds_ago, ten_seconds_ago))

    ten_seconds_ago = time.time() - 10
    # Written so recently that another change might leave size and time as they are: read each time.
    assert [reads_and_is_valid(), reads_and_is_valid()] == [(True, True), (True, True)]
    write_events(content)
    assert [reads_and_is_valid(), reads_and_is_valid()] == [(True, True), (False, True)]
    write_events(content.replace(b"50.0", b"90.0"))  # the size and the modification time stay the same
    assert [reads_and_is_valid(), reads_and_is_valid()] == [(True, False), (False, False)]
    write_events(content)
    assert reads_and_is_valid() == (True, True)
