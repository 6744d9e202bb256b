"""The results page: made from run directories only, with simulated runs in a separate table."""

import json
import re
import shutil

import pytest
from conftest import TINY
from processes import python
from test_devices import needs_sim, run_ranks

from vgglab.view import results
from vgglab.view.seeds_table import seeds_table

pytestmark = pytest.mark.usefixtures("narrow")


def test_page_has_a_row_per_run_and_marks_published_results(images, tmp_path):
    for num_ranks in (1, 2):
        run_ranks(tmp_path, images, "cpu", num_ranks, "--skip-steps=1")
    rows = results.collect([tmp_path])
    assert [row["ranks"] for row in rows] == [1, 2]
    assert all(row["images/s"] > 0 and row["steps"] > 0 and row["p90 step time"] >= 1 for row in rows)
    assert rows[1]["scaling"] == pytest.approx(rows[1]["images/s"] / rows[0]["images/s"] / 2)
    text = results.as_text(rows)
    assert text.count("published: ") == 4
    assert "590.3" in text
    assert "71.30" in text
    for row in rows:
        assert row["source"] in text
        assert row["source"] in results.as_html(rows)


def test_scaling_does_not_compare_runs_with_other_settings(images, tmp_path):
    """It compared them if they differed only in the optimizer, --ema or --sync-bn, for example."""
    run_ranks(tmp_path, images, "cpu", 1, "--skip-steps=1", "--ema=0.9")
    run_ranks(tmp_path, images, "cpu", 2, "--skip-steps=1")
    assert [row["scaling"] for row in results.collect([tmp_path])] == [None, None]


def test_scaling_refers_to_the_nearest_run_on_one_rank(images, tmp_path):
    one, two = (run_ranks(tmp_path, images, "cpu", num_ranks, "--skip-steps=1").path for num_ranks in (1, 2))
    folder = tmp_path / "in the order of their names"
    for name, path, slower in ("1", one, 1), ("2", two, 1), ("3", two, 1), ("4", one, 5):
        shutil.copytree(path, folder / name)
        report = json.loads((path / "report.json").read_text())
        report["step_seconds_p50"] *= slower  # measured at another time
        (folder / name / "report.json").write_text(json.dumps(report))
    config = json.loads((folder / "1" / "config.json").read_text())
    del config["ema"]  # written by a version that did not have this setting
    (folder / "1" / "config.json").write_text(json.dumps(config))
    first, second, third, last = results.collect([folder])
    assert second["scaling"] == pytest.approx(second["images/s"] / first["images/s"] / 2)
    assert third["scaling"] == pytest.approx(third["images/s"] / last["images/s"] / 2)
    assert "Scaling: " in results.as_text([first, second])
    assert "Scaling: " not in results.as_text([first])


@needs_sim
def test_simulated_run_has_no_speed_and_a_separate_table(images, tmp_path):
    real = run_ranks(tmp_path, images, "cpu", 1, "--skip-steps=1")
    simulated = run_ranks(tmp_path, images, "gcu-sim", 1, "--skip-steps=1")
    rows = results.collect([tmp_path])
    speeds = {row["source"]: row["images/s"] for row in rows}
    assert speeds[simulated.path.name] is None
    measured, others = results.as_text(rows).split("On a simulated card")
    assert real.path.name in measured
    assert simulated.path.name in others
    assert simulated.path.name not in measured


def test_command_line(images, tmp_path):
    run = run_ranks(tmp_path, images, "cpu", 1)
    page = tmp_path / "page.html"
    result = python("-m", "vgglab.view.results", tmp_path, "--html", page)
    assert result.returncode == 0, result.stderr
    assert run.path.name in page.read_text()
    assert not re.search("https?:", page.read_text())  # self-contained
    assert python("-m", "vgglab.view.results", tmp_path, "--html", page).returncode == 0  # replaced
    (tmp_path / "mine.html").write_text("mine")
    rejected = python("-m", "vgglab.view.results", tmp_path, "--html", tmp_path / "mine.html")
    assert (rejected.returncode, (tmp_path / "mine.html").read_text()) == (2, "mine")
    assert python("-m", "vgglab.view.results", tmp_path / "nowhere").returncode == 2
    shutil.rmtree(run.path / "log")
    (run.path / "events.jsonl").unlink()  # a run that has just started is not listed
    assert results.collect([run.path]) == []


def test_benchmark_has_a_row_per_mode(images, tmp_path):
    run = run_ranks(tmp_path, images, "cpu", 1)
    device = {"hardware": "a CPU", "amp_dtype": "bfloat16", "tf32": False, "channels_last": True, "simulated": False}
    row = {
        "way": "fast", "batch_size": 16, "images_per_second": 5.0, "ratio": 2.5, "num_turns": 5, "device": device,
    }  # fmt: skip
    (run.path / "bench.json").write_text(json.dumps({"results": [row, {**row, "way": "float32"}]}))
    first, second = results.collect([run.path])
    assert (first["x plain loop"], first["precision"], first["layout"]) == (2.5, "bfloat16", "channels last")
    assert second["source"].endswith("mode float32")


def bench_result(bench, peak):
    """A benchmark's result for one mode: 5 images/s of 1000 operations each, with this peak."""
    return {
        "way": "float32", "batch_size": 4, "images_per_second": 5.0, "ratio": 1.1, "num_turns": 5,
        "flop_per_image": 1000, "peak_flop_per_second": peak, "device": bench.env,
    }  # fmt: skip


@pytest.mark.parametrize("value", [{"a": []}, ["x"], "x", None, -1, 1e999, True], ids=repr)
def test_any_value_in_the_files_of_a_benchmark_gives_a_row_or_a_reason(images, tmp_path, capsys, value):
    """A field without a type in the schema would end the whole page with a traceback."""
    bench = run_ranks(tmp_path, images, "cpu", 1)
    device = {name: bench.env[name] for name in ("hardware", "amp_dtype", "tf32", "channels_last", "simulated")}
    row = {**bench_result(bench, 1e6), "device": device}
    for result in [{**row, name: value} for name in row] + [
        {**row, "device": {**device, name: value}} for name in device
    ]:
        (bench.path / "bench.json").write_text(json.dumps({"results": [result]}))
        rows = results.collect([tmp_path])
        assert results.as_html(rows)
        assert bool(rows) != ("left out: " in capsys.readouterr().err)


def test_each_heading_has_a_value_or_none_in_each_kind_of_row(images, tmp_path):
    """A heading that was forgotten in one of them gave an empty column, and a value without a heading was not shown."""
    run_ranks(tmp_path, images, "cpu", 1)
    bench = run_ranks(tmp_path, images, "cpu", 1)
    (bench.path / "bench.json").write_text(json.dumps({"results": [bench_result(bench, 1e6)]}))
    run, benchmark = results.collect([tmp_path])
    assert {*run} == {*results.COLUMNS, "is simulated", "settings"}
    assert {*benchmark} == {*results.COLUMNS, "is simulated", "peak images/s"}
    assert all({*row} == {*results.COLUMNS} for row in results.published())


def test_column_whose_field_has_no_type_does_not_end_the_page(images, tmp_path, monkeypatch):
    monkeypatch.setitem(results.COLUMNS, "other", results.Column("{:,} bytes", False, "other"))
    bench = run_ranks(tmp_path, images, "cpu", 1)
    for value in ([1], {"a": 1}, 10**400, 2560):
        (bench.path / "bench.json").write_text(json.dumps({"results": [{**bench_result(bench, 1e6), "other": value}]}))
        assert ("2,560 bytes" if value == 2560 else "?") in results.as_text(results.collect([tmp_path]))


def test_only_runs_on_the_same_data_hardware_and_software_are_compared():
    conditions = {heading for heading, column in results.COLUMNS.items() if column.is_condition}
    assert conditions == {"data", "hardware", "precision", "layout", "torch"}


def test_run_shows_its_share_of_the_measured_peak(images, tmp_path):
    timed, measured = (run_ranks(tmp_path, images, "cpu", 1, "--skip-steps=1", *more) for more in (["--timers"], []))
    bench = run_ranks(tmp_path, images, "cpu", 1)
    row = bench_result(bench, 1e6)
    (bench.path / "bench.json").write_text(json.dumps({"results": [row]}))
    rows = {row["source"].split(",")[0]: row for row in results.collect([tmp_path])}
    assert rows[bench.path.name]["share of peak"] == pytest.approx(0.005)
    rate = rows[measured.path.name]["images/s"]
    assert rows[measured.path.name]["share of peak"] == pytest.approx(rate / 1000)
    assert (rows[timed.path.name]["layout"], rows[measured.path.name]["layout"]) == ("with timers", "")


def test_seeds_are_named_with_their_folder_and_averaged(images, tmp_path):
    words = ["--seeds=2", f"--data-path={images}", f"--run-dir={tmp_path / 'runs/tiny-seeds'}"]
    assert python("-m", "vgglab.train", *TINY, *words).returncode == 0
    rows = results.collect([tmp_path / "runs"])
    assert [(row["source"], row["data"]) for row in rows] == [(f"tiny-seeds/seed-{seed}", "images") for seed in (1, 2)]
    text = python("-m", "vgglab.view.results", tmp_path / "runs").stdout
    last = text.split(results.SERIES)[1]
    assert "tiny-seeds" in last
    assert "fewer than 5 seeds" in last
    assert results.SERIES not in results.as_text(rows)


def test_share_above_the_peak_is_explained(images, tmp_path):
    bench = run_ranks(tmp_path, images, "cpu", 1)
    row = bench_result(bench, 4e3)
    (bench.path / "bench.json").write_text(json.dumps({"results": [row]}))
    assert results.OVER_PEAK in results.as_text(results.collect([tmp_path]))
    (bench.path / "bench.json").write_text(json.dumps({"results": [{**row, "peak_flop_per_second": 6e3}]}))
    assert results.OVER_PEAK not in results.as_text(results.collect([tmp_path]))


@pytest.mark.parametrize("damage", ["missing setting", "truncated bench.json", "outdated bench.json"])
def test_unreadable_run_is_named_and_the_others_are_listed(train, capsys, damage):
    good, bad = (train("--seed=1").run for _ in range(2))
    if damage == "missing setting":
        config = {name: value for name, value in bad.config.items() if name != "batch_size"}
        (bad.path / "config.json").write_text(json.dumps(config))
    else:
        text = '{"results": [' if damage == "truncated bench.json" else '{"results": [{"speed": 1}]}'
        (bad.path / "bench.json").write_text(text)
    rows = results.collect([good.path, bad.path])
    assert [row["source"] for row in rows] == [good.name]
    stderr = capsys.readouterr().err
    assert f"left out: {bad.name}: " in stderr
    assert "UserError" not in stderr
    row = seeds_table({"both": [good, bad]}).rows[0]
    assert row[2] == ("1" if damage == "missing setting" else "2")
