"""Damaged and malicious run directories: each problem is reported, and the damaged part is ignored."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import traceback
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import shell

import vgglab
from vgglab import Run, Seeds, UserError
from vgglab.runs.compare import compare_runs
from vgglab.runs.report import _compute_metrics
from vgglab.storage.schema import DOCUMENTS, EVENTS, append_line, with_checksum, write_document
from vgglab.view import results, run_tables, summaries
from vgglab.view.live import _TerminalLines, progress_of, summary
from vgglab.view.rank_table import rank_table

HOSTILE = (
    None, True, False, -1, 0, 10**30, 1e308, 1e-320, "x", "", [], {}, [1], {"a": 1}, "<img src=x onerror=alert(1)>",
    "\x1b]0;owned\x07", "a\nb", "\u202eevil", "\ud800", "$x_1$", [["a"] * 3], 2**53, {"<b>": "<script>"}, "é" * 5000,
    2**31, 1e39, json.loads("[" * 300 + "]" * 300),
)  # fmt: skip
LINES = (
    b"5", b'"x"', b"[1]", b"null", b'{"a": 1}', b'{"event": "train", "seconds": 1}', b'{"event": 5, "seconds": 1}',
    b'{"event": "eval", "seconds": 1, "epoch": null}', b'{"event": "start", "seconds": NaN}', b"[" * 100_000, b"\xff\0",
    b'{"event": "__class__", "seconds": 1}', b'{"event": "end", "seconds": 3, "status": ["done"], "error": null}',
)  # fmt: skip
FILES = ("config.json", "env.json", "launch.json", "events.jsonl", "log/rank0.jsonl", "log/failure-rank0.json",
         "log/skipped-rank0.jsonl", "log/rank0.txt")  # fmt: skip


@pytest.fixture
def run(train):
    """A finished run with each kind of file. Its process is gone: in an active run, the last line may be incomplete."""
    path = train("--print-freq=1").run.path
    env = {**Run(path).env, "process": "gone"}
    write_document(path / "env.json", env)
    launched = {name: env[name] for name in ("host", "pid", "process")}
    write_document(path / "launch.json", {**launched, "argv": ["--epochs=2"], "command": ["python"]})
    failure = {"rank": 0, "time": 1.5, "host": "here", "error": "E: x", "traceback": "t", "exit_code": 1}
    write_document(path / "log" / "failure-rank0.json", {**failure, "has_lost_peers": False})
    append_line(path / "log" / "skipped-rank0.jsonl", {"image": "a.jpg", "reason": "no image"})
    os.utime(path / "events.jsonl")  # so that the end of the run belongs to this launch
    return Run(path)


def outputs(path, other):
    """The output of each view of a run: text, or the one-line message of a UserError."""
    views = {
        "repr": lambda run: repr(run) + repr(run.report()) + repr(run.failures()) + run.logs(),
        "html": lambda run: run._repr_html_() + run.report()._repr_html_(),
        "page.html": lambda run: results.as_html(results.collect([path]), {"a": [other, run]}),
        "results": lambda run: results.as_text(results.collect([path]), {"a": [other, run]}),
        "compare": lambda run: repr(compare_runs(other, run)),
        "seeds": lambda run: repr(run_tables.seeds_table({"a": [other, run]})),
        "report page": lambda run: "".join(repr(table([run])) for table in report_tables()),
        "report page.html": lambda run: "".join(table([other, run])._repr_html_() for table in report_tables()),
        "settings": lambda run: run_tables.common_settings([run]),
        "runs": lambda run: repr(summaries.runs_table([run, other])),
        "ranks.html": lambda run: rank_table(run)._repr_html_(),
        "dashboard": lambda run: summary(run, progress_of(run)) + "".join(run.last_lines(0, 6)) + repr(run.skipped()),
        "terminal": lambda run: _TerminalLines(run).update(),
        "stop": lambda run: run.stop(0.1),
    }
    texts = {}
    for name, view in views.items():
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            try:
                texts[name] = f"{view(Run(path))}{screen.getvalue()}"
            except UserError as error:
                texts[name] = str(error)
                assert "\n" not in texts[name]
    return texts


def report_tables():
    return run_tables.report_table, run_tables.settings_table, run_tables.machine_table, run_tables.warnings_table


def mutated(data, rng):
    """The content with one accidental or malicious change; anyone can compute the checksum."""
    kind = rng.choice(["bit", "cut", "insert", "line", "drop", "double", "shuffle", "field", "field", "field"])
    lines = data.split(b"\n")
    position, number = rng.randrange(len(data)), rng.randrange(len(lines))
    if kind == "bit":
        return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]
    if kind == "cut":
        return data[:position]
    if kind == "insert":
        return data[:position] + rng.choice([b"\n", b"\0", b'"', b"}\n5\n", b"\xff\xfe", b"1e999,"]) + data[position:]
    if kind == "line":
        lines.insert(number, rng.choice(LINES))
    elif kind == "drop":
        del lines[number]
    elif kind == "double":
        lines.insert(number, lines[number])
    elif kind == "shuffle":
        rng.shuffle(lines)
    else:
        return with_changed_field(data, rng)
    return b"\n".join(lines)


def with_changed_field(data, rng):
    lines = [data] if data.startswith(b"{\n") else data.rstrip(b"\n").split(b"\n")
    number = rng.randrange(len(lines))
    try:
        content = json.loads(lines[number])
    except ValueError:  # a log file
        return data + repr(rng.choice(HOSTILE)).encode()
    content[rng.choice([*content, "another"])] = rng.choice(HOSTILE)
    if rng.random() < 0.7:
        content.pop("check", None)
        content = with_checksum(content)
    lines[number] = json.dumps(content).encode()
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("times", [15, pytest.param(1000, marks=pytest.mark.long)])
def test_a_damaged_file_causes_at_most_a_one_line_error(run, tmp_path, name, times):
    other = Run(shutil.copytree(run.path, tmp_path / "other"))
    data, rng = (run.path / name).read_bytes(), random.Random(name)
    for number in range(times):
        (run.path / name).write_bytes(mutated(data, rng))
        if number % 10 == 0 and find_spec("matplotlib"):  # as slow as everything else together
            from vgglab.view.figures import curves_beside

            with contextlib.suppress(UserError):
                curves_beside([other, Run(run.path)]).png()
        for view, text in outputs(run.path, other).items():
            assert not set("\x1b\x07\u202e\ud800") & set(text), view
            assert "<img" not in text or not view.endswith("html"), view
            assert "<script" not in text or not view.endswith("html"), view


def test_each_field_of_an_event_has_a_type(train):
    """The fixture checks this after each run; this one has the fields that few runs have."""
    train("--print-freq=1", "--timers", "--skip-steps=0", "--epochs=2", "--warmup=3")


@pytest.mark.parametrize("name", ["events.jsonl", "config.json", "env.json"])
@pytest.mark.parametrize("times", [150, pytest.param(None, marks=pytest.mark.long)])
def test_a_flipped_bit_is_detected_or_changes_no_metric(run, name, times):
    def metrics():
        report = dict(current_run.report())
        report.pop("events_checksum")  # not a metric: it changes even with a digit beyond the precision of float64
        return report.pop("damage"), (report, current_run.status, dict(current_run.config), dict(current_run.env))

    current_run = run
    damage, before = metrics()
    assert damage == []
    data, num_detected = (run.path / name).read_bytes(), 0
    bits = range(8 * len(data)) if times is None else random.Random(0).sample(range(8 * len(data)), times)
    for bit in bits:
        position = bit // 8
        changed = bytes([data[position] ^ 1 << bit % 8])
        (run.path / name).write_bytes(data[:position] + changed + data[position + 1 :])
        current_run = Run(run.path)
        try:
            damage, after = metrics()
        except UserError:  # one line with the name of the file
            num_detected += 1
            continue
        num_detected += bool(damage)
        if not damage:  # the bit was in the word "check" or between two fields
            extra = {key for fields in after[2:] for key in fields} - {key for fields in before[2:] for key in fields}
            after = (*after[:2], *({k: v for k, v in fields.items() if k not in extra} for fields in after[2:]))
            differing = {k: (v, after[0].get(k)) for k, v in before[0].items() if after[0].get(k) != v}
            assert after == before, (bit, data[max(0, position - 40) : position + 20], differing)
    assert num_detected > 0.5 * len(bits)


def test_damaged_lines_are_counted_in_every_view(run, tmp_path):
    file, other = run.path / "events.jsonl", Run(shutil.copytree(run.path, tmp_path / "other"))
    lines = file.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b'"loss": ', b'"loss": 1')
    file.write_bytes(b"\n".join([*lines[:-1], b'{"event": "eval", "seconds"']))
    assert Run(run.path).damage() == ["events.jsonl: 2 damaged lines, left out"]
    texts = outputs(run.path, other)
    for view in ("repr", "html", "page.html", "results", "compare", "seeds", "report page", "runs", "dashboard"):
        assert "2 damaged lines" in texts[view], view


def test_damaged_lines_in_the_list_of_skipped_images_are_counted(run):
    file = run.path / "log" / "skipped-rank0.jsonl"
    append_line(file, {"image": "b.jpg", "reason": "no image"})
    file.write_bytes(file.read_bytes().replace(b"a.jpg", b"c.jpg"))
    assert run.skipped() == {"b.jpg": "no image"}
    assert run.damage() == ["log/skipped-rank*.jsonl: 1 damaged line, left out"]


def test_a_list_of_skipped_images_is_read_only_up_to_a_limit(run):
    """64 MB of such lines (65 kB when compressed) stalled every table."""
    (run.path / "log" / "skipped-rank0.jsonl").write_bytes(b"x\n" * 2**25)
    too_long, damage = [text for text in run.damage() if "skipped" in text]
    assert too_long == "log/skipped-rank0.jsonl: too long to read in full, so skipped images are undercounted"
    assert int(re.search("[0-9]+ damaged", damage).group().split()[0]) <= 2**19


def test_a_comparison_is_valid_json_for_any_value_of_a_setting(run, tmp_path):
    other = Path(shutil.copytree(run.path, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "lr": 1, "check": None})[:-1] + ', "new": 1e999}')
    result = shell("python", "-m", "vgglab.compare", "--json", run.path, other)
    assert "new" in json.loads(result.stdout.splitlines()[-1], parse_constant=pytest.fail)["settings"]


def test_a_field_of_the_wrong_type_is_reported_and_ignored(run, tmp_path):
    other = shutil.copytree(run.path, tmp_path / "other")
    env = json.loads((run.path / "env.json").read_text())
    write_document(run.path / "env.json", {**env, "started": ["now"], "check": None})
    assert "env.json: started has the wrong type and is ignored" in run.damage()
    assert run.started == ""
    assert "started" not in run.env
    with pytest.raises(UserError, match=r"env\.json: has no valid started"):
        run.env["started"]
    config = json.loads((run.path / "config.json").read_text())
    write_document(run.path / "config.json", {**config, "model": {"vgg": 16}, "lr": "fast", "check": None})
    assert run.report()["model"] is run.report()["lr"] is None
    assert "model has the wrong type" in outputs(run.path, Run(other))["page.html"]
    for name in ("model", "lr"):
        assert f"config.json: {name} has the wrong type and is ignored" in run.report()["damage"]
    write_document(run.path / "config.json", {**config, "batch_size": "many", "check": None})
    with pytest.raises(UserError, match=r"config\.json: has no valid batch_size"):
        run.report()


def test_a_pipe_or_folder_in_place_of_a_file_does_not_block(run, tmp_path):
    other = Run(shutil.copytree(run.path, tmp_path / "other"))
    for name in FILES:
        shutil.copy(run.path / name, tmp_path / "backup")
        for create in (os.mkfifo, os.mkdir):
            (run.path / name).unlink()
            create(run.path / name)
            outputs(run.path, other)
            os.rmdir(run.path / name) if create is os.mkdir else os.unlink(run.path / name)
            shutil.copy(tmp_path / "backup", run.path / name)


def test_a_link_in_place_of_a_file_is_not_followed(run, tmp_path):
    """Otherwise, a run directory of someone else could display private files of its reader."""
    other = Run(shutil.copytree(run.path, tmp_path / "other"))
    for name in FILES:
        (run.path / name).rename(tmp_path / "secret")
        (run.path / name).symlink_to(tmp_path / "secret")
        outputs(run.path, other)
        if name.endswith(".txt"):
            assert Run(run.path).logs() == ""
        (run.path / name).unlink()
        (tmp_path / "secret").rename(run.path / name)
    (run.path / "events.jsonl").rename(tmp_path / "events.jsonl")
    (run.path / "events.jsonl").symlink_to(tmp_path / "events.jsonl")
    with pytest.raises(UserError, match="is a symbolic link and was not read"):
        Run(run.path).events()


def test_an_oversized_file_is_not_read_into_memory(run, tmp_path):
    other = Run(shutil.copytree(run.path, tmp_path / "other"))
    for name in FILES:
        with open(run.path / name, "r+b") as file:
            file.truncate(2**33)  # sparse, uses no disk space
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
    code += "import test_schema, vgglab\nfrom pathlib import Path\n"
    code += "print(len(test_schema.outputs(Path(sys.argv[1]), vgglab.Run(sys.argv[2]))))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = shell("python", "-c", code, run.path, other.path, env={**os.environ, "PYTHONPATH": path})
    assert result.stdout.split() == ["14"], result.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become another user")
def test_files_without_read_permission_are_reported_in_one_line(run, shared_folder):
    other = Run(shutil.copytree(run.path, shared_folder / "other"))
    run = Run(shutil.copytree(run.path, shared_folder / "run"))
    names = [*FILES, "log", "."]
    for name in names:
        mode = (run.path / name).stat().st_mode
        os.chmod(run.path / name, 0)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            try:
                outputs(run.path, other)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, name
        os.chmod(run.path / name, mode)


def test_missing_lines_are_detected(run):
    file = run.path / "events.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for missing in range(len(lines) - 1):
        file.write_bytes(b"".join(lines[:missing] + lines[missing + 1 :]))
        assert Run(run.path).damage() == ["events.jsonl: 1 line missing"], missing
    file.write_bytes(b"".join([*lines[:3], lines[2], *lines[3:]]))
    assert Run(run.path).damage() == ["events.jsonl: 1 damaged line, left out"]
    file.write_bytes(b"".join(lines[:-1]))
    assert Run(run.path).status != "done"


def test_steps_without_individual_times_are_counted(run):
    """An interval of a trillion steps without the time of each step."""
    many = {"interval_steps": 10**12, "interval_images": 4 * 10**12, "interval_seconds": 1e9, "data_seconds": 0.0}
    event = {"event": "train", "seconds": 2, "epoch": 0, "step": 9, "loss": 1.0, "acc1": 1.0, "lr": 0.1}
    append_line(run.path / "events.jsonl", {**event, **many, "is_measured": True, "images_per_second": 4000.0})
    report = run.report()
    assert report["num_measured_steps"] == 10**12
    assert report["step_seconds_p50"] == report["step_seconds_p99"] == 0.001


def test_another_encoding_does_not_hide_a_control_character(run):
    warning = with_checksum({"event": "warning", "seconds": 1, "text": "evil"})
    line = json.dumps(warning).replace("evil", "\u202eevil").encode("utf-16-be")
    (run.path / "events.jsonl").write_bytes((run.path / "events.jsonl").read_bytes() + line + b"\n")
    assert "\u202e" not in repr(Run(run.path).report())
    assert "1 damaged line" in repr(Run(run.path))


def test_a_seed_folder_with_a_non_ascii_digit_is_ignored(run, tmp_path):
    for seed in ("1", "\N{SUPERSCRIPT TWO}"):
        shutil.copytree(run.path, tmp_path / "many" / f"seed-{seed}")
    assert len(Seeds(tmp_path / "many").runs) == 1


@pytest.mark.parametrize("invalid", [{"num_classes": None}, {"num_classes": 10**9}, {"image_size": 3}])
def test_predict_refuses_settings_that_no_flag_allows(run, invalid):
    write_document(run.path / "config.json", {**run.config, **invalid})
    with pytest.raises(UserError, match=r"config\.json"):
        vgglab.predict(run)


def test_each_kind_of_event_has_a_step_or_an_epoch():
    """After a resume, repeated events are dropped by their step or epoch; one that has neither would appear twice."""
    without = {kind for kind, fields in EVENTS.items() if not fields.keys() & {"step", "epoch"}}
    assert without == {"start", "end", "warning"}


def test_each_metric_of_the_report_is_declared(run):
    """One that is not would be left out of report.json without a word."""
    assert _compute_metrics(run, 1).keys() == DOCUMENTS["report.json"].keys()


def test_runs_of_earlier_versions_without_checksums_are_not_damaged():
    recorded = Path(__file__).resolve().parent.parent / "recorded"
    runs = [Run(file.parent) for file in recorded.rglob("env.json")]
    assert len(runs) > 15
    assert [damage for run in runs for damage in run.damage()] == []
