"""Output of notebook cells: a run, its report, and a table of runs; as text and as HTML."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from vgglab.errors import UserError, printable
from vgglab.runs.run import Run
from vgglab.view.tables import Table, html_facts

SETTINGS = ("data_path", "model", "epochs", "batch_size", "lr", "image_size", "device", "world_size", "seed")
RUN_HEADINGS = ("name", "status", "model", "device", "epochs planned", "best top-1 %", "images/s")


class Report(dict):
    """The metrics of ``report.json``, as a dict that is displayed as a table."""

    def __repr__(self) -> str:
        return repr(Table(("", ""), self._metrics()))

    def _repr_html_(self) -> str:
        return html_facts(self._metrics())

    def _metrics(self) -> list[tuple[str, str]]:
        return [(name, _text(value)) for name, value in self.items()]


def run_as_html(run: Run) -> str:
    """Return a summary of a run as HTML: status, main settings, accuracy, speed and location."""
    facts = [("run", run.name), ("status", status_line(run))]
    report = report_of(run)
    if report is not None:
        facts += [(name.replace("_", " "), str(report[name])) for name in SETTINGS if report.get(name) is not None]
        unit = "" if report["images_per_second"] is None else " images/s"
        speed = metric(report, "images_per_second", ",.1f") + unit
        facts += [("best top-1, %", _best(report) or "not evaluated yet"), ("speed", speed)]
    return html_facts([*facts, ("path", printable(str(run.path)))])


def status_line(run: Run) -> str:
    """Return the status of a run, and notes on damaged parts of its files, which were ignored."""
    try:
        return "; ".join([run.status, *run.damage()])
    except UserError as error:  # a damaged run must not prevent the table of all runs
        return f"unreadable: {error}"


def damage_of(run: Run) -> list[str]:
    """Return ``run.damage()``, or the reason why the run cannot be read."""
    try:
        return run.damage()
    except UserError as error:
        return [str(error)]


def report_of(run: Run) -> Mapping[str, Any] | None:
    """Return the report of a run; None if the run has not written anything yet or its files are damaged."""
    try:
        return run.report()
    except UserError:
        return None


def runs_table(runs: Sequence[Run]) -> Table:
    """Return a table with one row per run, in the given order; simulated cards are marked and have no speed."""
    rows = []
    for run in runs:
        report, cells = report_of(run), [""] * 5
        if report is not None:
            speed = report["images_per_second"]
            device = f"{report['device']} (simulated)" if report["simulated"] else report["device"]
            speed_text = "" if speed is None else f"{speed:,.1f}"
            cells = [report["model"], device, str(report["epochs"]), _best(report), speed_text]
        rows.append([run.name, status_line(run), *cells])
    return Table(RUN_HEADINGS, rows)


def metric(report: Mapping[str, Any], name: str, form: str = ".2f", factor: float = 1.0) -> str:
    """Return ``report[name]`` times ``factor`` in the format ``form``, or "not measured (<reason>)"."""
    if report[name] is not None:
        return f"{factor * report[name]:{form}}"
    reason = f"not available on {report['device']}"  # the most likely one
    if report["simulated"]:
        reason = "a simulated card has no speed"
    elif report.get("test_only"):
        reason = "a run with --test-only has no training steps"
    elif not report["num_measured_steps"]:
        reason = f"all steps fell within --skip-steps {report['skip_steps']}"
    return f"not measured ({reason})"


def precision(description: Mapping[str, Any]) -> str:
    """Return the precision, a data type or tf32, from a report or a device description."""
    return description.get("amp_dtype") or ("tf32" if description.get("tf32") else "float32")


def _best(report: Mapping[str, Any]) -> str:
    if report["acc1"] is None:
        return ""
    return f"{report['acc1']:.2f}" + " (generated images)" * bool(report["data_is_fake"])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "none"
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
