"""A run directory as it is read: also while it goes on in place, is launched again, removed, or made anew."""

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
from vgglab.view.rank_table import rank_rows
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


def add(path, *events):
    with (path / "events.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(event)}\n" for event in events)


TRAINED = []  # trained once in each process of the tests


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
def dead():
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owned_by(path, name, pid):
    file = path / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **identity(pid)}))


def test_only_testing_in_place_is_refused_and_voids_nothing(train):
    run = train().run
    before = run.events()
    result = train(f"--run-dir={run.path}", "--resume=auto", "--test-only")
    assert result.code == 2
    assert "already contains a run" in result.err
    assert vgglab.Run(run.path).events() == before


@pytest.fixture
def lock(path):
    """Held, as by a run that is active."""
    lock = Lock(path / "lock")
    yield lock
    lock.close()


@pytest.mark.usefixtures("lock")
def test_a_run_is_there_as_long_as_rank_0_or_its_launcher_is(path, dead):
    add(path, START)
    owned_by(path, "env.json", dead)
    assert vgglab.Run(path).status == "failed"
    owned_by(path, "launch.json", os.getpid())  # torchrun between two attempts, or the next launch, loading
    assert vgglab.Run(path).status == "running"
    owned_by(path, "env.json", os.getpid())  # gone on with from a shell
    owned_by(path, "launch.json", dead)
    assert vgglab.Run(path).status == "running"


def test_the_end_of_a_former_launch_is_not_that_of_this_one(path, dead):
    owned_by(path, "env.json", dead)
    add(path, START, {"event": "end", "seconds": 9, "status": "interrupted", "error": None})
    run = vgglab.Run(path)
    assert run.status == "interrupted"
    os.utime(path / "events.jsonl", (time.time() - 60,) * 2)
    owned_by(path, "launch.json", os.getpid())
    assert run.status == "starting"


def test_a_launch_that_is_refused_in_the_place_of_one_that_ended_well_is_an_error(images, tmp_path):
    flags = [*TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}", "--resume=auto"]
    assert vgglab.launch(flags, watch=False).wait().status == "done"
    run = vgglab.launch([*flags, "--num-classes=7"], watch=False)
    with pytest.raises(vgglab.UserError, match="--num-classes 7"):
        run.wait()
    assert run.status == "failed"
    assert (vgglab.Run(run.path).status, run.failures()) == ("done", [])  # what is there is as it was


def test_damage_is_listed_whatever_is_damaged(train):
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
def test_a_folder_that_is_removed_is_no_run_that_goes_on_and_one_made_anew_is_another_run(path):
    add(path, START, trained(2), trained(4))
    owned_by(path, "env.json", os.getpid())
    run = vgglab.Run(path)
    assert run.status == "running"
    kept = {file.name: file.read_bytes() for file in path.glob("*.json")}
    shutil.rmtree(path)
    assert run.status == "failed"
    path.mkdir()
    for name, content in kept.items():
        (path / name).write_bytes(content)
    add(path, START)
    assert [event["event"] for event in run.events()] == ["start"]


def test_on_a_terminal_what_came_after_a_checkpoint_is_told_again_and_nothing_is_left_out(path, capsys):
    add(path, START, *(trained(step) for step in range(2, 22, 2)))
    lines = _TerminalLines(vgglab.Run(path))
    lines.update()
    capsys.readouterr()
    add(path, {**START, "first_step": 10}, trained(12), trained(14))
    lines.update()
    told = capsys.readouterr().out
    assert "10 training images" not in told
    assert "digits: 9 training images" in told
    assert [line.split(":")[0] for line in told.splitlines()[1:]] == [f"epoch 1 of 9, step {n} of 90" for n in (12, 14)]


def test_a_simulated_cards_time_and_that_of_other_ranks_is_not_the_speed_of_this_hardware(path):
    config = json.loads((path / "config.json").read_text())
    assert config["batch_size"] == 4
    other = {"images_per_second": 99.0, "interval_seconds": 0.1}
    add(
        path,
        START,
        trained(2, simulated=True, **other),
        trained(4, interval_images=16, **other),
        trained(6),
        trained(8),
    )
    report = vgglab.Run(path).report()
    assert (report["train_fps_mean"], report["train_fps_max"], report["num_measured_steps"]) == (8.0, 8.0, 4)


def test_a_remark_is_made_once_a_run_however_often_it_went_on(path):
    for step in (0, 10, 20):
        add(path, {**START, "first_step": step}, {"event": "warning", "seconds": step, "text": "fake", "step": step})
    run = vgglab.Run(path)
    assert run.report()["warnings"] == ["fake"]
    assert "runs" not in warnings_table([run])._repr_html_()


def test_ranks_that_are_gone_and_their_figures_are_not_in_the_table(path):
    add(path, START)
    for file in (path / "log").glob("rank*.jsonl"):
        file.unlink()
    for rank, lines in {0: [(1, 0.1), (5, 0.1)], 1: [(2, 0.9), (2, 0.9), (6, 0.1)], 2: [(3, 0.1)]}.items():
        figures = {"step": 2, "loss": 1.0, "interval_steps": 1, "interval_seconds": 1.0, "time": 1.0}
        text = "".join(f"{json.dumps({**figures, 'rank': rank, 'pid': p, 'own_seconds': own})}\n" for p, own in lines)
        (path / "log" / f"rank{rank}.jsonl").write_text(text)
    env = json.loads((path / "env.json").read_text())
    (path / "env.json").write_text(json.dumps({**env, "world_size": 2}))
    rows = rank_rows(vgglab.Run(path))
    assert [(row.rank, row.own_seconds, row.is_straggler) for row in rows] == [(0, 0.1, False), (1, 0.1, False)]


def test_seeds_are_drawn_and_told_while_one_has_only_begun(path, tmp_path):
    for seed in (1, 2):
        shutil.copytree(path, tmp_path / "many" / f"seed-{seed}")
        add(tmp_path / "many" / f"seed-{seed}", START, *([trained(2), trained(4)] if seed == 1 else []))
    seeds = vgglab.Seeds(tmp_path / "many")
    assert bands({"many": seeds.runs}).axes[0].lines
    assert "no seed has finished yet" in repr(seeds)
    assert seeds.runs[0] is seeds.runs[0]  # which reads on where it was


def test_the_end_of_a_log_is_read_without_the_rest(tmp_path):
    add(tmp_path, START)
    (tmp_path / "log").mkdir()
    (tmp_path / "log/rank0.txt").write_text("".join(f"line {number} é\n" for number in range(10_000)))
    run = vgglab.Run(tmp_path)
    assert run.last_lines(0, 3) == run.logs().splitlines()[-3:]
    assert run.last_lines("launcher", 3) == []


def test_the_runs_in_folders_are_found_in_the_order_in_which_they_began(path, tmp_path):
    late, seeds = path, tmp_path / "more" / "several-seeds"
    for number, folder in enumerate((seeds / "seed-1", seeds / "seed-2", tmp_path / "more" / "alone")):
        shutil.copytree(path, folder)
        os.utime(folder / "config.json", (number + 1, number + 1))
    (tmp_path / "more" / "no-run").mkdir()
    runs = vgglab.Runs(tmp_path / "more", late, late)  # twice is once
    assert [run.path for run in runs] == [seeds / "seed-1", seeds / "seed-2", tmp_path / "more" / "alone", late]
    assert runs[-1].path == late
    assert [line.split()[0] for line in repr(runs).strip().splitlines()[-4:]] == [run.name for run in runs]
    assert "several-seeds/seed-2" in runs._repr_html_()
    (seeds / "seed-1" / "events.jsonl").write_text("nonsense")
    assert "several-seeds/seed-1" in repr(vgglab.Runs(tmp_path / "more"))
    with pytest.raises(vgglab.UserError, match="nowhere: no such folder"):
        vgglab.Runs(tmp_path / "nowhere")
