"""Speed and accuracy of many runs, compared with Enflame's published results.

    python -m vgglab.view.results                      # all runs under runs/, as text
    python -m vgglab.view.results runs --html page.html

Speeds are those of the measured steps. A simulated card has no speed, so its runs are in a separate table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from vgglab.errors import UserError, printable
from vgglab.runs.folder import find_series, run_dirs
from vgglab.runs.run import ACTIVE, Run
from vgglab.storage.schema import read_document
from vgglab.view.seeds_table import seeds_table
from vgglab.view.summaries import precision
from vgglab.view.tables import POLICY, Table

# From Enflame's README, for one T20 and for eight; it does not say whether 431.6 is per card or in total.
PUBLISHED = (
    ("one card, batch 256, Enflame's first README", 1, 256, 590.3, None),
    ("eight cards, Enflame's first README (unclear whether the speed is per card or in total)", 8, 192, 431.6, None),
    ("90 epochs, Enflame's first README", None, 192, None, 71.6),
    ("90 epochs, Enflame's later README", None, 192, None, 71.3),
)
TITLE = "<title>vgglab: results</title>"
SERIES = "Several seeds, completed runs only"
SCALING = (
    "Scaling: images/s of n ranks, divided by n times the images/s of one rank with the same settings. If several runs "
    "with one rank match, the one closest in alphabetical order is used (default names begin with the date); the load "
    "on the machine may have differed between the two runs."
)
OVER_PEAK = (
    "A share of peak can exceed 100 %: operations are counted from the shapes of the layers, but a convolution can be "
    "computed with fewer operations (Winograd's algorithm). The matrix product that measures the peak cannot."
)


class Result(NamedTuple):
    """One row: a run and its results; fields that were not measured are None."""

    model: str
    data: str  # name of the data set or of its folder
    hardware: str
    precision: str  # float32, tf32, or the type of mixed precision
    layout: str  # memory layout and other options in use, such as fused
    batch_size: int
    image_size: int
    torch: str
    source: str  # the run directory, or where it was published
    ranks: int | None = None
    images_per_second: float | None = None  # of all ranks, at the median step
    num_steps: int | None = None  # that were measured
    slow_ratio: float | None = None  # 90th percentile of the step time, divided by the median
    plain_ratio: float | None = None  # images/s divided by those of a plain PyTorch loop in the same run
    acc1: float | None = None
    is_simulated: bool = False
    is_fake: bool = False
    efficiency: float | None = None  # images/s divided by ranks x images/s of one rank with the same settings
    peak_images_per_second: float | None = None  # of one card, at the FLOP/s of a matrix product in this precision
    report: Mapping[str, Any] = {}  # of the run; empty for benchmarks and published results

    @property
    def share_of_peak(self) -> float | None:
        """Images/s divided by those at the peak FLOP/s; None if one of the two was not measured."""
        if not (self.images_per_second and self.peak_images_per_second):
            return None
        return self.images_per_second / (self.peak_images_per_second * (self.ranks or 1))

    def cells(self) -> tuple[str, ...]:
        """Return the cells as text, one for each heading."""
        return tuple(column(self) for column in COLUMNS.values())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


COLUMNS: dict[str, Callable[[Result], str]] = {
    "model": lambda row: row.model,
    "data": lambda row: row.data,
    "hardware": lambda row: row.hardware,
    "precision": lambda row: row.precision,
    "layout": lambda row: row.layout,
    "ranks": lambda row: _number(row.ranks, "{}"),
    "batch per card": lambda row: str(row.batch_size),
    "image size": lambda row: str(row.image_size),
    "images/s": lambda row: _number(row.images_per_second, "{:.1f}"),
    "steps": lambda row: _number(row.num_steps, "{}"),
    "p90 step time": lambda row: _number(row.slow_ratio, "{:.2f} x median"),
    "x plain loop": lambda row: _number(row.plain_ratio, "{:.2f}"),
    "share of peak": lambda row: _number(row.share_of_peak, "{:.0%}"),
    "scaling": lambda row: _number(row.efficiency, "{:.0%}"),
    "top-1 %": lambda row: "fake images" if row.is_fake and row.acc1 is not None else _number(row.acc1, "{:.2f}"),
    "torch": lambda row: row.torch,
    "source": lambda row: row.source,
}


def published() -> list[Result]:
    """Return Enflame's published results for the original example."""
    settings = ("vgg16", "ImageNet", "Enflame T20", "float32", "")
    return [
        Result(*settings, batch, 224, "1.10", f"published: {where}", ranks=ranks, images_per_second=speed, acc1=acc1)
        for where, ranks, batch, speed, acc1 in PUBLISHED
    ]


def collect(folders: Iterable[Path]) -> list[Result]:
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
    return _with_peak(_with_efficiency(runs), benchmarks) + benchmarks


def _of_run(run: Run) -> Result:
    report = run.report()
    median_step, p90_step = report["step_seconds_p50"], report["step_seconds_p90"]
    return Result(
        **_of_device(report),
        model=report["model"],
        data=Path(report["data_path"] or "").name,
        batch_size=report["batch_size"],
        image_size=report["image_size"],
        torch=report["versions"].get("torch") or "",
        source="; ".join([run.name, *report["damage"]]),
        ranks=report["world_size"],
        images_per_second=report["global_batch_size"] / median_step if median_step else None,
        num_steps=report["num_measured_steps"] or None,
        slow_ratio=p90_step / median_step if median_step else None,
        acc1=report["acc1"],
        is_fake=report["data_is_fake"],
        report=report,
    )


def _of_benchmark(row: dict[str, Any], run: Run) -> Result:
    device, flop, peak = row["device"], row.get("flop_per_image"), row.get("peak_flop_per_second")
    speed, ratio = (None, None) if device["simulated"] else (row["images_per_second"], row["ratio"])
    return Result(
        **_of_device(device),
        model=run.config["model"],
        data="fake",
        batch_size=row["batch_size"],
        image_size=run.config["image_size"],
        torch=run.env["versions"].get("torch") or "",
        source="; ".join([f"{run.name}, mode {row['way']}", *run.damage()]),
        ranks=1,
        images_per_second=speed,
        num_steps=row["num_turns"],
        plain_ratio=ratio,
        peak_images_per_second=peak / flop if peak and flop else None,
    )


def _of_device(description: dict[str, Any]) -> dict[str, Any]:
    """The fields that a report and the device of a benchmark have in common."""
    options = {"channels_last": "channels last", "fused": "fused", "compiled": "compiled", "timers": "with timers"}
    return {
        "hardware": description["hardware"],
        "precision": precision(description),
        "layout": ", ".join(text for name, text in options.items() if description.get(name)),
        "is_simulated": description["simulated"],
    }


def series_of(folders: Iterable[Path]) -> dict[str, list[Run]]:
    """Return the series of runs in these folders that differ only in their seed, by folder name."""
    return {printable(folder.name): runs for folder, runs in find_series(folders).items()}


def _with_efficiency(results: list[Result]) -> list[Result]:
    """Add the parallel efficiency of runs with several ranks, relative to a run with one rank and the same settings."""

    def key(row: Result) -> tuple:
        network = (row.model, row.data, row.batch_size, row.image_size)
        return (*network, row.hardware, row.precision, row.layout, row.torch)

    single_rank: dict[tuple, list[tuple[int, float]]] = {}  # by key: index in the list, images/s
    for index, row in enumerate(results):
        if row.ranks == 1 and row.images_per_second:
            single_rank.setdefault(key(row), []).append((index, row.images_per_second))

    def efficiency(index: int, row: Result) -> float | None:
        if not (row.images_per_second and row.ranks and row.ranks > 1 and key(row) in single_rank):
            return row.efficiency
        _, speed = min(single_rank[key(row)], key=lambda other: abs(other[0] - index))
        return row.images_per_second / (row.ranks * speed)

    return [row._replace(efficiency=efficiency(index, row)) for index, row in enumerate(results)]


def _with_peak(runs: list[Result], benchmarks: list[Result]) -> list[Result]:
    """Add the peak speed that a benchmark of the same model, image size, hardware and precision has measured."""

    def key(row: Result) -> tuple:
        return (row.model, row.hardware, row.precision, row.image_size)

    peaks = {key(row): row.peak_images_per_second for row in benchmarks}
    return [row._replace(peak_images_per_second=peaks.get(key(row))) for row in runs]


def tables(results: Sequence[Result], series: Mapping[str, Sequence[Run]] | None = None) -> list[Table]:
    """Return the tables: measured runs, simulated runs, and ``series``, the runs that differ only in their seed."""
    real = [row for row in results if not row.is_simulated]
    simulated = [row for row in results if row.is_simulated]
    notes = [SCALING] if any(row.efficiency for row in real) else []
    notes += [OVER_PEAK] if any((row.share_of_peak or 0) > 1 for row in real) else []
    title = "Measured runs; rows marked 'published' are results from Enflame, which were not measured here"
    all_tables = [Table([*COLUMNS], [row.cells() for row in real + published()], title, " ".join(notes))]
    if simulated:
        title = "On a simulated card: the losses are real; the speed is meaningless and not shown"
        all_tables.append(Table([*COLUMNS], [row.cells() for row in simulated], title))
    return [*all_tables, seeds_table(series)._replace(title=SERIES)] if series else all_tables


def as_text(results: Sequence[Result], series: Mapping[str, Sequence[Run]] | None = None) -> str:
    """Return the tables as text."""
    return "\n\n".join(map(repr, tables(results, series)))


def as_html(results: Sequence[Result], series: Mapping[str, Sequence[Run]] | None = None) -> str:
    """Return a complete HTML page that loads nothing from elsewhere."""
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
