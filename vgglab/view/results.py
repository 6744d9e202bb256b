"""Speed and accuracy of many runs, compared with Enflame's published results.

    python -m vgglab.view.results                      # all runs under runs/, as text
    python -m vgglab.view.results runs --html page.html

Speeds are those of the measured steps. Runs on a simulated card, whose speed means nothing, have their own table.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from operator import itemgetter
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Sequence

from vgglab.errors import UserError, printable
from vgglab.runs.folder import find_series, run_dirs
from vgglab.runs.run import ACTIVE, Run
from vgglab.settings.config import Request, settings_that_affect
from vgglab.storage.schema import number, read_document
from vgglab.view.seeds_table import seeds_table
from vgglab.view.summaries import precision
from vgglab.view.tables import POLICY, Table

# From Enflame's README, for one T20 and for eight; it does not say whether 431.6 is per card or in total.
FIRST = "Enflame's first README"
PUBLISHED = (
    (f"published: one card, batch 256, {FIRST}", 1, 256, 590.3, None),
    (f"published: eight cards, {FIRST} (unclear whether the speed is per card or in total)", 8, 192, 431.6, None),
    (f"published: 90 epochs, {FIRST}", None, 192, None, 71.6),
    ("published: 90 epochs, Enflame's later README", None, 192, None, 71.3),
)
TITLE = "<title>vgglab: results</title>"
SERIES = "Several seeds, completed runs only"
SCALING = (
    "Scaling: images/s of n ranks, divided by n times the images/s of one rank with the same settings, except for "
    "the length of the training, the number of workers and the seed. If several runs with one rank match, the one "
    "nearest in alphabetical order is used (default names begin with the date); the load on the machine may have "
    "differed between the two runs."
)
OVER_PEAK = (
    "A share of peak can exceed 100 %: operations are counted from the shapes of the layers, but a convolution can be "
    "computed with fewer operations (Winograd's algorithm). The matrix product that measures the peak is not computed "
    "in this way."
)

# The settings that runs must have in common to compare their speed. Not the number of ranks, on which the default
# number of workers depends; nor the length of the run, its seed and the path of its data, whose name is compared.
COMPARED = settings_that_affect("weights", "speed") - {
    "world_size", "workers", "epochs", "training_step_per_epoch", "seed", "data_path",
}  # fmt: skip
DEFAULTS = {field.name: field.default for field in fields(Request) if field.name in COMPARED}

Row = Dict[str, Any]  # the values of a run, by heading; None if not measured


class Column(NamedTuple):
    """How the values of a column are displayed and compared."""

    form: str
    is_condition: bool  # whether only runs that agree in it can be compared; settings are compared in any case
    field: str = ""  # the field with its value, if it has the same name in a report and in a benchmark's result


COLUMNS = {
    "model": Column("{}", False, "model"),
    "data": Column("{}", True),  # name of the data set or of its folder
    "hardware": Column("{}", True, "hardware"),
    "precision": Column("{}", True),  # float32, tf32, or the type of mixed precision
    "layout": Column("{}", True),  # memory layout and other options in use, such as fused
    "ranks": Column("{}", False),
    "batch per card": Column("{}", False, "batch_size"),
    "image size": Column("{}", False, "image_size"),
    "images/s": Column("{:.1f}", False),  # of all ranks, at the median step
    "steps": Column("{}", False),  # that were measured
    "p90 step time": Column("{:.2f} x median", False),
    "x plain loop": Column("{:.2f}", False),  # images/s divided by those of a plain PyTorch loop in the same run
    "share of peak": Column("{:.0%}", False),  # images/s divided by those at the FLOP/s of a matrix product
    "scaling": Column("{:.0%}", False),  # images/s divided by ranks x images/s of one rank with the same settings
    "top-1 %": Column("{:.2f}", False),
    "torch": Column("{}", True),
    "source": Column("{}", False),  # the run directory, or where it was published
}


def published() -> list[Row]:
    """Return Enflame's published results for the original example."""
    settings = {"model": "vgg16", "data": "ImageNet", "image size": 224}
    stack = {"hardware": "Enflame T20", "precision": "float32", "torch": "1.10"}
    headings = ("source", "ranks", "batch per card", "images/s", "top-1 %")
    return [{**dict.fromkeys(COLUMNS), **settings, **stack, **dict(zip(headings, row))} for row in PUBLISHED]


def collect(folders: Iterable[Path]) -> list[Row]:
    """Return one row for each run in or under the folders, and for each mode measured by a benchmark.

    Raises:
        UserError: a folder does not exist.
    """
    runs, benchmarks = [], []
    for path in run_dirs(folders):
        bench = path / "bench.json"
        try:
            if bench.exists():
                benchmarks += [_of_benchmark(row, Run(path)) for row in read_document(bench)["results"]]
            elif Run(path).has_begun:
                runs.append(_of_run(Run(path)))
            elif Run(path).status not in ACTIVE:  # active runs may have only just begun
                raise UserError("no readable events")
        except UserError as error:  # one unreadable run must not hide the others
            print(f"left out: {printable(path.name)}: {error}", file=sys.stderr)
        except (ValueError, KeyError, TypeError):
            print(f"left out: {printable(path.name)}: damaged, or from another version of vgglab", file=sys.stderr)
    _add_scaling(runs)
    _add_share_of_peak(runs, benchmarks)
    return runs + benchmarks


def _of_run(run: Run) -> Row:
    report = run.report()
    median_step, p90_step, acc1 = report["step_seconds_p50"], report["step_seconds_p90"], report["acc1"]
    settings = {**DEFAULTS, **run.config}  # an older run lacks settings that were added after it
    return {
        **_shared_values(report),
        **dict.fromkeys(("x plain loop", "share of peak", "scaling")),  # the last two are computed from several rows
        "settings": repr([settings[name] for name in DEFAULTS]),  # as text: a dictionary key below
        "data": Path(report["data_path"] or "").name,
        "ranks": report["world_size"],
        "images/s": report["global_batch_size"] / median_step if median_step else None,
        "steps": report["num_measured_steps"] or None,
        "p90 step time": p90_step / median_step if median_step else None,
        "top-1 %": "fake images" if report["data_is_fake"] and acc1 is not None else acc1,
        "source": "; ".join([run.name, *report["damage"]]),
    }


def _of_benchmark(result: dict[str, Any], run: Run) -> Row:
    device, flop, peak = result["device"], result.get("flop_per_image"), result.get("peak_flop_per_second")
    speed, ratio = (None, None) if device["simulated"] else (result["images_per_second"], result["ratio"])
    settings = {"model": run.config["model"], "image_size": run.config["image_size"]}
    return {
        **_shared_values({**device, **result, **settings, "versions": run.env["versions"]}),
        **dict.fromkeys(("p90 step time", "scaling", "top-1 %")),
        "data": "fake",
        "ranks": 1,
        "images/s": speed,
        "steps": result["num_turns"],
        "x plain loop": ratio,
        "share of peak": speed * flop / peak if speed and flop and peak else None,
        "source": "; ".join([f"{run.name}, mode {result['way']}", *run.damage()]),
        "peak images/s": peak / flop if flop and peak else None,
    }


def _shared_values(report: dict[str, Any]) -> Row:
    """Values computed in the same way for runs and benchmarks, whose results have the same field names."""
    options = {"channels_last": "channels last", "fused": "fused", "compiled": "compiled", "timers": "with timers"}
    return {
        **{heading: report.get(column.field) for heading, column in COLUMNS.items() if column.field},
        "precision": precision(report),
        "layout": ", ".join(text for name, text in options.items() if report.get(name)),
        "torch": report["versions"].get("torch"),
        "is simulated": report["simulated"],
    }


def series_of(folders: Iterable[Path]) -> dict[str, list[Run]]:
    """Return the series of runs in these folders that differ only in their seed, by folder name."""
    return {printable(folder.name): runs for folder, runs in find_series(folders).items()}


# The settings that runs must have in common: for scaling, and for a peak that a benchmark has measured.
_settings = itemgetter("settings", *(heading for heading, column in COLUMNS.items() if column.is_condition))
_peak_settings = itemgetter("model", "image size", "hardware", "precision")


def _add_scaling(rows: Sequence[Row]) -> None:
    """Compare each run that has several ranks with the nearest run that has one rank and the same settings."""
    single_rank: dict[tuple, list[int]] = {}  # indices by settings
    for index, row in enumerate(rows):
        if row["ranks"] == 1 and row["images/s"]:
            single_rank.setdefault(_settings(row), []).append(index)
    for index, row in enumerate(rows):
        others = single_rank.get(_settings(row))
        if others and row["ranks"] > 1 and row["images/s"]:
            _, nearest = min((abs(other - index), other) for other in others)
            row["scaling"] = row["images/s"] / (row["ranks"] * rows[nearest]["images/s"])


def _add_share_of_peak(rows: Sequence[Row], benchmarks: Sequence[Row]) -> None:
    """Compare each run with the peak that a benchmark with the same settings has measured."""
    peaks = {_peak_settings(row): row["peak images/s"] for row in benchmarks}
    for row in rows:
        peak = peaks.get(_peak_settings(row))
        if peak and row["images/s"]:
            row["share of peak"] = row["images/s"] / (row["ranks"] * peak)


def tables(results: Sequence[Row], series: Mapping[str, Sequence[Run]] | None = None) -> list[Table]:
    """Return the tables: measured runs, simulated runs, and ``series``, the runs that differ only in their seed."""
    real = [row for row in results if not row["is simulated"]]
    simulated = [row for row in results if row["is simulated"]]
    notes = [SCALING] if any(row["scaling"] for row in real) else []
    notes += [OVER_PEAK] if any((row["share of peak"] or 0) > 1 for row in real) else []
    title = "Measured runs; rows marked 'published' are results from Enflame, which were not measured here"
    all_tables = [_table(real + published(), title, " ".join(notes))]
    if simulated:
        title = "On a simulated card: the losses are real; the speed is meaningless and not shown"
        all_tables.append(_table(simulated, title))
    return [*all_tables, seeds_table(series)._replace(title=SERIES)] if series else all_tables


def _table(rows: Sequence[Row], title: str, note: str = "") -> Table:
    cells = [[_cell(row[heading], column.form) for heading, column in COLUMNS.items()] for row in rows]
    return Table([*COLUMNS], cells, title, note)


def _cell(value: Any, form: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return form.format(value) if number(value) else "?"


def as_text(results: Sequence[Row], series: Mapping[str, Sequence[Run]] | None = None) -> str:
    """Return the tables as text."""
    return "\n\n".join(map(repr, tables(results, series)))


def as_html(results: Sequence[Row], series: Mapping[str, Sequence[Run]] | None = None) -> str:
    """Return a complete HTML page without external resources."""
    tables_html = "".join(table._repr_html_() for table in tables(results, series))
    style = (
        "body{font:16px/1.4 sans-serif;margin:2em;color:#333}table{border-collapse:collapse}"
        "td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left;font-variant-numeric:tabular-nums}"
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"{TITLE}{POLICY}<style>{style}</style><h1>Results</h1>{tables_html}</html>\n"
    )


if __name__ == "__main__":  # the former command, now ``vgglab results``
    from vgglab.commands import call

    sys.exit(call("results"))
