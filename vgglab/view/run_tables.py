"""Tables of runs: results, settings, machines, warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from vgglab.runs.run import Run
from vgglab.settings.config import settings_that_affect
from vgglab.view import results
from vgglab.view.seeds_table import seeds_table as seeds_table  # exported to notebooks, like Table
from vgglab.view.summaries import precision, status_line
from vgglab.view.tables import Table as Table

# The fields of the original example's report, with its names and in its order.
ORIGINAL_FIELDS = (
    "model local_rank batch_size epochs training_step_per_epoch eval_step_per_epoch acc1 acc5 device skip_steps "
    "train_fps_mean train_fps_min train_fps_max training_time"
).split()


def results_tables(folders: Sequence[str | Path]) -> list[Table]:
    """Return tables of the speed and accuracy of the runs and benchmarks in ``folders``, with Enflame's results.

    Raises:
        UserError: a folder does not exist.
    """
    return results.tables(results.collect(map(Path, folders)))


def report_table(runs: Sequence[Run]) -> Table:
    """Return one row per run: the original example's report, whether the card was simulated, and the status."""
    rows = []
    for run in runs:
        report = run.report()
        cells = [_text(report[name]) for name in ORIGINAL_FIELDS]
        rows.append([run.name, *cells, "yes" if report["simulated"] else "", status_line(run)])
    return Table(["run", *ORIGINAL_FIELDS, "simulated", "status"], rows)


def settings_table(runs: Sequence[Run]) -> Table:
    """Return a table of the settings that differ between the runs, except for locations and launch settings."""
    settings = [_settings_of(run) for run in runs]
    names = dict.fromkeys(name for run_settings in settings for name in run_settings)
    values = {name: [_text(run_settings.get(name)) for run_settings in settings] for name in names}
    rows = [[name, *texts] for name, texts in values.items() if len(set(texts)) > 1]
    return Table(["setting", *(run.name for run in runs)], rows)


def common_settings(runs: Sequence[Run]) -> str:
    """Return the settings that are the same in all runs, as a line of flags."""
    differing = {row[0] for row in settings_table(runs).rows}
    common = {name: value for name, value in _settings_of(runs[0]).items() if name not in differing}
    return " ".join(f"--{n.replace('_', '-')}={_text(v)}" for n, v in common.items() if v not in (None, False))


def _settings_of(run: Run) -> dict[str, Any]:
    excluded = settings_that_affect("location", "launch")
    return {name: value for name, value in run.config.items() if name not in excluded}


def machine_table(runs: Sequence[Run]) -> Table:
    """Return a table with one row per run: hardware, ranks, precision, versions, commit."""
    rows = []
    for run in runs:
        env = run.env
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
        hardware = f"{env['hardware']} (simulated card)" if env["simulated"] else env["hardware"]
        rows.append([run.name, hardware, str(env["world_size"]), precision(env), versions, _text(env.get("commit"))])
    return Table(["run", "hardware", "ranks", "precision", "versions", "commit"], rows)


def warnings_table(runs: Sequence[Run]) -> Table:
    """Return a table of the warnings of the runs, without duplicates."""
    runs_by_warning: dict[str, list[str]] = {}
    for run in runs:
        for text in dict.fromkeys(event["text"] for event in run.events("warning")):
            runs_by_warning.setdefault(text, []).append(run.name)
    rows = [[text, names[0] if len(names) == 1 else f"{len(names)} runs"] for text, names in runs_by_warning.items()]
    return Table(["warning", "run"], rows)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
