"""Reading a run directory, also while its run is resumed in place, relaunched, deleted or recreated."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

import vgglab
from vgglab.dist.processes import identity
from vgglab.storage.lock import Lock
from vgglab.storage.schema import with_checksum
from vgglab.view.figures import bands
from vgglab.view.live import _TerminalLines
from vgglab.view.rank_table import rank_table
from vgglab.view.run_tables import warnings_table

START = {
    "event": "start", "seconds": 0, "epochs": 9, "first_epoch": 0, "first_step": 0, "num_steps": 90, "best": None,
    "is_fake": False, "steps_per_epoch": 10, "num_classes": 10, "num_train_images": 9, "num_eval_images": 9,
    "num_parameters": 1, "data": "digits",
}  # fmt: skip


def trained(step, **more):
    figures = {"loss": 1.0, "acc1": 50.0, "lr": 0.1, "images_per_second": 8.0, "is_measured": True}
    interval = {"interval_steps": 2, "interval_images": 8, "interval_seconds": 1.0, "data_seconds": 0.0}
    return {"event": "train", "seconds": step, "step": step, "epoch": 0, **figures, **interval, **more}


def test_an_event_of_a_new_kind_is_not_repeated_after_a_resume(path):
    """Only the kinds that were listed by name were assigned to an epoch."""
    restart = {**START, "first_epoch": 1, "first_step": 10}
    kept, redone = ({"event": "calibration", "seconds": 1, "epoch": epoch} for epoch in (0, 1))
    append_events(path, START, kept, redone, restart, redone)
    assert [event["epoch"] for event in vgglab.Run(path).events("calibration")] == [0, 1]


def append_events(path, *events):
    with (path / "events.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(event)}\n" for event in events)


TRAINED = []  # a single run, once per pytest process


@pytest.fixture
def path(request, tmp_path, tmp_path_factory):
    """A run that has ended, with its settings and machine, and no events yet."""
    if not TRAINED:
        run = request.getfixturevalue("train")().run
        TRAINED.append(Path(shutil.move(run.path, tmp_path_factory.mktemp("trained"))))
        for name in ("events.jsonl", "report.json"):
            (TRAINED[0] / name).unlink()
    return Path(shutil.copytree(TRAINED[0], tmp_path / "runs" / TRAINED[0].name))


@pytest.fixture
def exited_pid():
    """The ID of a process that has exited."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def record_process(path, name, pid):
    file = path / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **identity(pid)}))


def test_test_only_in_place_is_rejected_and_keeps_all_events(train):
    run = train().run
    before = run.events()
    result = train(f"--run-dir={run.path}", "--resume=auto", "--test-only")
    assert result.code == 2
    assert "already contains a run" in result.err
    assert vgglab.Run(run.path).events() == before


@pytest.fixture
def lock(path):
    """The lock of the run, held as by an active run."""
    lock = Lock(path / "lock")
    yield lock
    lock.close()


@pytest.mark.usefixtures("lock")
def test_run_is_active_while_rank_0_or_its_launcher_is(path, exited_pid):
    append_events(path, START)
    record_process(path, "env.json", exited_pid)
    assert vgglab.Run(path).status == "failed"
    record_process(path, "launch.json", os.getpid())  # torchrun between two attempts, or the next launch while it loads
    assert vgglab.Run(path).status == "running"
    record_process(path, "env.json", os.getpid())  # resumed from a shell
    record_process(path, "launch.json", exited_pid)
    assert vgglab.Run(path).status == "running"


def test_end_of_an_earlier_launch_does_not_end_this_one(path, exited_pid):
    record_process(path, "env.json", exited_pid)
    append_events(path, START, {"event": "end", "seconds": 9, "status": "interrupted", "error": None})
    run = vgglab.Run(path)
    assert run.status == "interrupted"
    os.utime(path / "events.jsonl", (time.time() - 60,) * 2)
    record_process(path, "launch.json", os.getpid())
    assert run.status == "starting"


def test_rejected_relaunch_of_a_finished_run_raises(images, tmp_path):
    flags = [*TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}", "--resume=auto"]
    assert vgglab.launch(flags, watch=False).wait().status == "done"
    run = vgglab.launch([*flags, "--num-classes=7"], watch=False)
    with pytest.raises(vgglab.UserError, match="--num-classes 7"):
        run.wait()
    assert run.status == "failed"
    assert (vgglab.Run(run.path).status, run.failures()) == ("done", [])  # the finished run is unchanged


def test_damage_is_listed_for_every_file(train):
    run = train("--print-freq=1").run
    kept = {name: (run.path / name).read_bytes() for name in ("config.json", "env.json", "events.jsonl", "report.json")}

    def damage(name, content):
        file = run.path / name
        file.unlink() if content is None else file.write_bytes(content)
        found = vgglab.Run(run.path).damage()
        for name, content in kept.items():
            (run.path / name).write_bytes(content)
        return found

    assert vgglab.Run(run.path).damage() == []
    for name in ("config.json", "env.json"):
        assert damage(name, b"{") == [f"{name}: cannot be read"]
        assert damage(name, None) == [f"{name}: is missing"]
    assert damage("report.json", b"{") == ["report.json: cannot be read"]
    report = with_checksum({**json.loads(kept["report.json"]), "num_lines": "many"})
    assert "report.json: num_lines has the wrong type and is ignored" in damage(
        "report.json", json.dumps(report).encode()
    )
    lines = kept["events.jsonl"].splitlines(keepends=True)
    assert damage("events.jsonl", None) == [f"events.jsonl: {len(lines)} lines missing at its end"]
    assert damage("events.jsonl", b"".join(lines[:-2])) == ["events.jsonl: 2 lines missing at its end"]
    without = {name: json.loads(content) for name, content in kept.items() if name != "events.jsonl"}
    for name, content in without.items():
        del content["check"]
        assert damage(name, json.dumps(content).encode()) == [
            f"{name}: has no checksum; it was changed after it was written"
        ]
    bare = b"".join(re.sub(rb', "check": "\w+"', b"", line) for line in lines)
    assert f"events.jsonl: {len(lines)} damaged lines, left out" in damage("events.jsonl", bare)
    log = run.path / "log" / "rank0.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
    assert vgglab.Run(run.path).damage() == ["log/rank*.jsonl: 1 damaged line, left out"]


@pytest.mark.usefixtures("lock")
def test_deleted_run_is_not_running_and_a_recreated_one_is_new(path):
    append_events(path, START, trained(2), trained(4))
    record_process(path, "env.json", os.getpid())
    run = vgglab.Run(path)
    assert run.status == "running"
    kept = {file.name: file.read_bytes() for file in path.glob("*.json")}
    shutil.rmtree(path)
    assert run.status == "failed"
    path.mkdir()
    for name, content in kept.items():
        (path / name).write_bytes(content)
    append_events(path, START)
    assert [event["event"] for event in run.events()] == ["start"]


def test_terminal_prints_repeated_steps_again_and_omits_none(path, capsys):
    append_events(path, START, *(trained(step) for step in range(2, 22, 2)))
    lines = _TerminalLines(vgglab.Run(path))
    lines.update()
    capsys.readouterr()
    append_events(path, {**START, "first_step": 10}, trained(12), trained(14))
    lines.update()
    output = capsys.readouterr().out
    assert "10 training images" not in output
    assert "digits: 9 training images" in output
    assert [line.split(":")[0] for line in output.splitlines()[1:]] == [
        f"epoch 1 of 9, step {n} of 90" for n in (12, 14)
    ]


def test_speed_excludes_simulated_steps_and_other_numbers_of_ranks(path):
    config = json.loads((path / "config.json").read_text())
    assert config["batch_size"] == 4
    excluded = {"images_per_second": 99.0, "interval_seconds": 0.1}
    append_events(
        path,
        START,
        trained(2, simulated=True, **excluded),
        trained(4, interval_images=16, **excluded),
        trained(6),
        trained(8),
    )
    report = vgglab.Run(path).report()
    assert (report["train_fps_mean"], report["train_fps_max"], report["num_measured_steps"]) == (8.0, 8.0, 4)


def test_warning_is_listed_once_however_often_the_run_resumed(path):
    for step in (0, 10, 20):
        append_events(
            path, {**START, "first_step": step}, {"event": "warning", "seconds": step, "text": "fake", "step": step}
        )
    run = vgglab.Run(path)
    assert run.report()["warnings"] == ["fake"]
    assert "runs" not in warnings_table([run])._repr_html_()


def test_rank_table_omits_earlier_ranks_and_processes(path):
    append_events(path, START)
    for file in (path / "log").glob("rank*.jsonl"):
        file.unlink()
    for rank, lines in {0: [(1, 0.1), (5, 0.1)], 1: [(2, 0.9), (2, 0.9), (6, 0.1)], 2: [(3, 0.1)]}.items():
        figures = {"step": 2, "loss": 1.0, "interval_steps": 1, "interval_seconds": 1.0, "time": 1.0}
        text = "".join(f"{json.dumps({**figures, 'rank': rank, 'pid': p, 'own_seconds': own})}\n" for p, own in lines)
        (path / "log" / f"rank{rank}.jsonl").write_text(text)
    env = json.loads((path / "env.json").read_text())
    (path / "env.json").write_text(json.dumps({**env, "world_size": 2}))
    rows = rank_table(vgglab.Run(path)).rows
    assert [(row[0], *row[-2:]) for row in rows] == [("0", "100 ms", ""), ("1", "100 ms", "")]


def test_seeds_are_drawn_and_printed_while_one_has_just_started(path, tmp_path):
    for seed in (1, 2):
        shutil.copytree(path, tmp_path / "many" / f"seed-{seed}")
        append_events(tmp_path / "many" / f"seed-{seed}", START, *([trained(2), trained(4)] if seed == 1 else []))
    seeds = vgglab.Seeds(tmp_path / "many")
    assert bands({"many": seeds.runs}).axes[0].lines
    assert "no seed has finished yet" in repr(seeds)
    assert seeds.runs[0] is seeds.runs[0]  # the same object, which continues where it stopped reading


def test_end_of_a_log_is_read_without_the_rest(tmp_path):
    append_events(tmp_path, START)
    (tmp_path / "log").mkdir()
    (tmp_path / "log/rank0.txt").write_text("".join(f"line {number} é\n" for number in range(10_000)))
    run = vgglab.Run(tmp_path)
    assert run.last_lines(0, 3) == run.logs().splitlines()[-3:]
    assert run.last_lines("launcher", 3) == []


def test_runs_in_folders_are_sorted_by_start_time(path, tmp_path):
    late, seeds = path, tmp_path / "more" / "several-seeds"
    for number, folder in enumerate((seeds / "seed-1", seeds / "seed-2", tmp_path / "more" / "alone")):
        shutil.copytree(path, folder)
        os.utime(folder / "config.json", (number + 1, number + 1))
    (tmp_path / "more" / "no-run").mkdir()
    runs = vgglab.Runs(tmp_path / "more", late, late)  # given twice, listed once
    assert [run.path for run in runs] == [seeds / "seed-1", seeds / "seed-2", tmp_path / "more" / "alone", late]
    assert runs[-1].path == late
    assert [line.split()[0] for line in repr(runs).strip().splitlines()[-4:]] == [run.name for run in runs]
    assert "several-seeds/seed-2" in runs._repr_html_()
    (seeds / "seed-1" / "events.jsonl").write_text("nonsense")
    assert "several-seeds/seed-1" in repr(vgglab.Runs(tmp_path / "more"))
    with pytest.raises(vgglab.UserError, match="nowhere: no such folder"):
        vgglab.Runs(tmp_path / "nowhere")
