"""A run of a million events: read without holding it in memory, and with the same outcome as a short one."""

import json

import pytest
from test_runs import START, path, trained  # noqa: F401  # path is a fixture

import vgglab
from vgglab.commands import call
from vgglab.runs.compare import compare_runs
from vgglab.storage import events
from vgglab.storage.schema import with_checksum
from vgglab.view.live import progress_of, summary

NUM_PARSED = 5
EVALUATED = {
    "event": "eval", "seconds": 30, "step": 30, "epoch": 0, "acc1": 50.0, "acc5": 90.0, "loss": 1.0, "num_images": 9,
}  # fmt: skip
AGAIN = {**START, "seconds": 60, "first_epoch": 1, "first_step": 30}
LATER = {**AGAIN, "first_step": 45}
END = {"event": "end", "seconds": 99, "status": "done", "error": None}


def training(first, last, **more):
    order = ("event", "seconds", "epoch", "step")  # as the trainer writes them
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
    "to its end": [START, *training(1, 31), EVALUATED, *training(31, 61), END],
    "continued": [START, *training(1, 31), EVALUATED, *training(31, 41), END, AGAIN, *training(31, 51), END],
    "continued twice": [START, *training(1, 41), AGAIN, *training(31, 51), LATER, *training(46, 61)],
    "by timers": [START, *training(1, 41, phase_seconds={"data": 0.5, "forward": 1.0}, host_reads={"a.py:3": 2})],
}


@pytest.mark.parametrize("history", HISTORIES)
def test_it_reads_as_a_short_one(history, path, monkeypatch):  # noqa: F811
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


def test_what_is_new_is_taken_in_and_nothing_twice(path, monkeypatch):  # noqa: F811
    write(path, START, *training(1, 31))
    run = read(path, monkeypatch, is_long=True)
    before = run.events("train")
    write(path, *training(31, 41), first=31)
    assert [event["step"] for event in run.events("train")] == [*range(1, 41)]
    assert len(before) == 30
    assert progress_of(run).step == 40


@pytest.mark.parametrize("place", [0, 3, 12, 20, 40])
def test_each_flipped_bit_is_noticed(place, path, monkeypatch):  # noqa: F811
    write(path, START, *training(1, 41))
    content = bytearray((path / "events.jsonl").read_bytes())
    lines = content.split(b"\n")
    at = sum(len(line) + 1 for line in lines[:place])
    for offset in range(0, len(lines[place]), 7):
        for bit in (0, 4):
            changed = bytearray(content)
            changed[at + offset] ^= 1 << bit
            if b"\n" in changed[at : at + len(lines[place])]:
                continue  # two lines, which the short way has a test for
            (path / "events.jsonl").write_bytes(changed)
            run = read(path, monkeypatch, is_long=True)
            assert "events.jsonl: 1 damaged line, left out" in run.damage()
            assert len(run.events()) == 40


def test_a_line_that_is_missing_is_counted(path, monkeypatch):  # noqa: F811
    write(path, START, *training(1, 41))
    lines = (path / "events.jsonl").read_text().splitlines(keepends=True)
    (path / "events.jsonl").write_text("".join(lines[:20] + lines[21:]))
    assert "events.jsonl: 1 line missing" in read(path, monkeypatch, is_long=True).damage()


def test_a_file_that_changes_under_the_reader_is_an_error_and_no_figure(path, monkeypatch):  # noqa: F811
    write(path, START, *training(1, 41))
    run = read(path, monkeypatch, is_long=True)
    train = run.events("train")
    text = (path / "events.jsonl").read_text()
    (path / "events.jsonl").write_text(text.replace('"lr": 0.1', '"lr": 0.2'))
    with pytest.raises(vgglab.UserError, match=r"events\.jsonl: was changed while it was read"):
        list(train)


def test_a_report_that_was_changed_is_not_believed(path, monkeypatch):  # noqa: F811
    write(path, *HISTORIES["to its end"])
    true = vgglab.Run(path).report()
    assert true["damage"] == []
    saved = {**true, "acc1": 99.0}

    def acc1(report):
        (path / "report.json").write_text(json.dumps(report))
        return vgglab.Run(path).report()["acc1"]

    assert acc1(with_checksum(saved)) == 99.0  # intact and of these events: it is what was computed at the end
    assert acc1({**with_checksum(true), "acc1": 99.0}) == 50.0
    assert acc1(with_checksum({**saved, "peak_bytes": "<b>"})) == 50.0
    assert acc1(with_checksum({**saved, "status": "running"})) == 50.0
    assert acc1(with_checksum({name: value for name, value in saved.items() if name != "warnings"})) == 50.0
    (path / "report.json").write_text(json.dumps(with_checksum(saved)))
    assert call("report", [str(path)]) == 0
    assert json.loads((path / "report.json").read_text())["acc1"] == 50.0
    write(path, *training(61, 62), first=len(HISTORIES["to its end"]))
    assert acc1(with_checksum(saved)) == 50.0
