"""``report.json``: the final metrics of a run, computed from its settings and events.

It can be deleted: ``python -m vgglab.report RUN`` writes it again.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from heapq import merge
from itertools import repeat
from typing import TYPE_CHECKING, Any, Iterable

from vgglab.errors import UserError
from vgglab.storage.schema import DOCUMENTS

if TYPE_CHECKING:
    from vgglab.runs.run import Event, Run

STEADY_RATIO = 1.2  # warn if the slowest tenth of the steps takes more than this multiple of the median
MIN_MEASURED_STEPS = 20
PERCENTS = (50, 90, 99)  # of the times of single steps
TIMER_FIELDS = ("phase_seconds", "host_reads")  # event fields with --timers: sums over an interval, by name


def build_report(run: Run, recompute: bool = False) -> dict[str, Any]:
    """The report of a run: the fields of the original example's report, then others that help to interpret them.

    ``acc1`` and ``acc5`` are the best of all evaluations, in percent, independently of each other, as in the original
    example; ``acc1_last`` and ``acc5_last`` are those of the last evaluation.
    ``train_fps_*`` are images per second of the whole job, including data loading. Each interval between two log lines
    is one measurement; the first ``skip_steps`` steps do not count. The speeds are null if no interval is left, and
    for a simulated card, whose speed means nothing. ``training_time`` (h:mm:ss) is the time from the first event to
    the last, including evaluation and checkpoints.

    The metrics come from ``report.json`` if it is valid, unless ``recompute`` is set; otherwise from the events.

    Raises:
        UserError: there is nothing to report yet, ``config.json`` or ``env.json`` is missing, or the run is damaged.
    """
    config, env = run.config, run.env
    if not run.has_begun:
        raise UserError(f"{run.path}: nothing to report yet")
    if not config or not env:
        raise UserError(
            f"{run.path}: {'env.json' if config else 'config.json'} is missing; no report can be computed without it"
        )
    images_per_step = config["batch_size"] * env["world_size"]
    metrics: dict[str, Any] | None = None if recompute else run.valid_report()
    if metrics is None:
        try:
            metrics = _compute_metrics(run, images_per_step)
        except (KeyError, TypeError, ArithmeticError) as error:
            raise UserError(f"{run.path}: is damaged or was written by another version ({error!r})") from error
    return {
        "model": config.get("model"),
        "local_rank": 0,
        "batch_size": config["batch_size"],
        "epochs": config.get("epochs"),
        "training_step_per_epoch": config.get("training_step_per_epoch"),
        "eval_step_per_epoch": config.get("eval_step_per_epoch"),
        "acc1": metrics["acc1"],
        "acc5": metrics["acc5"],
        "device": config.get("device"),
        "skip_steps": config.get("skip_steps"),
        "train_fps_mean": metrics["images_per_second"],
        "train_fps_min": metrics["train_fps_min"],
        "train_fps_max": metrics["train_fps_max"],
        "training_time": metrics["training_time"],
        # Above: the original example's fields, in its order. Below: fields that vgglab adds.
        "status": run.status,
        "damage": run.damage(),
        "recipe": config.get("recipe"),
        "world_size": env["world_size"],
        "data_path": config.get("data_path"),
        "num_skipped_images": len(run.skipped()),
        "decoder": config.get("decoder"),
        "image_size": config.get("image_size"),
        "lr": config.get("lr"),
        "global_batch_size": images_per_step,
        "seed": config.get("seed"),
        "amp_dtype": env.get("amp_dtype"),
        "tf32": env.get("tf32"),
        **{mode: env.get(mode, False) for mode in ("channels_last", "fused", "compiled")},  # absent if not supported
        "timers": config.get("timers", False),
        "hardware": env.get("hardware"),
        "simulated": env["simulated"],
        "versions": env.get("versions", {}),
        **{name: metrics.get(name) for name in DOCUMENTS["report.json"]},
    }


def _compute_metrics(run: Run, images_per_step: int) -> dict[str, Any]:
    # First, so that the checksum does not match if the run writes more events meanwhile.
    checksum = run.events_checksum()
    events, is_simulated = run.events(), run.env["simulated"]
    if not events:
        raise UserError(f"{run.path}: nothing to report yet")
    speed, others, first_step_seconds, scalars = SpeedStatistics(), [], None, None
    for event in events:
        if event["event"] != "train":
            others.append(event)
            continue
        scalars = event.get("scalars")
        if not is_simulated:
            first_step_seconds = event.get("first_step_seconds") if first_step_seconds is None else first_step_seconds
            # A resumed run may have used other hardware: skip a simulated card, or another number of ranks.
            if not event.get("simulated") and event["interval_images"] == event["interval_steps"] * images_per_step:
                speed.add(event)

    def of_kind(kind: str) -> list[Event]:
        return [event for event in others if event["event"] == kind]

    last_evaluation: Event = next(reversed(of_kind("eval")), {})
    return {
        "acc1": _best(others, "acc1"),
        "acc5": _best(others, "acc5"),
        "acc1_last": last_evaluation.get("acc1"),
        "acc5_last": last_evaluation.get("acc5"),
        "training_time": _hours_minutes_seconds(events[-1]["seconds"]),
        **speed.statistics(),
        "first_step_seconds": first_step_seconds,
        "peak_bytes": next(iter(of_kind("end")), {}).get("peak_bytes"),
        "data_is_fake": any(event["is_fake"] for event in of_kind("start")),
        "warnings": [*dict.fromkeys(event["text"] for event in of_kind("warning"))],
        "num_lines": run.num_lines(),
        "events_checksum": checksum,
        "scalars": scalars,
    }


def _best(events: list[Event], metric: str) -> float | None:
    """The best value of ``metric`` in all evaluations; the start event of a resumed run has the best so far."""
    values: list[float] = []
    for event in events:
        if event["event"] == "start":  # it has the best so far, or none if earlier evaluations used other images
            values = [event["best"][metric]] if event["best"] else []
        elif event["event"] == "eval":
            values.append(event[metric])
    return max(values, default=None)


class SpeedStatistics:
    """Statistics of the measured intervals between log lines, added one at a time because there can be a million."""

    def __init__(self) -> None:
        self._rates = array("d")  # images per second
        self._num_images = 0
        self._seconds = self._data_seconds = 0.0
        self._step_seconds = array("d")
        self._mean_step_seconds: list[tuple[float, int]] = []  # (seconds, steps), if not timed individually
        # Sums of the --timers values, by field and name.
        self._timed: dict[str, dict[str, float]] = {field: defaultdict(int) for field in TIMER_FIELDS}
        self._num_timed_steps = dict.fromkeys(TIMER_FIELDS, 0)

    def add(self, event: Event) -> None:
        """Add a training event, unless its steps fall within ``skip_steps``."""
        if not event["is_measured"] or not event.keys() >= {"images_per_second", "data_seconds"}:
            return
        seconds, num_steps = event["interval_seconds"], event["interval_steps"]
        self._rates.append(event["images_per_second"])
        self._num_images += event["interval_images"]
        self._seconds += seconds
        self._data_seconds += event["data_seconds"]
        if event.get("step_seconds"):
            self._step_seconds.extend(event["step_seconds"])
        else:
            self._mean_step_seconds.append((seconds / num_steps, num_steps))
        for field, sums in self._timed.items():
            values = event.get(field)
            if isinstance(values, dict):
                self._num_timed_steps[field] += num_steps
                for name, value in values.items():
                    sums[name] += value

    def statistics(self) -> dict[str, Any]:
        """Speed, percentiles of step times, share of time spent waiting for data, means of the ``--timers`` fields."""
        num_steps = len(self._step_seconds) + sum(times for _, times in self._mean_step_seconds)
        ordered = merge(zip(sorted(self._step_seconds), repeat(1)), sorted(self._mean_step_seconds))
        means = {}
        for field, sums in self._timed.items():
            means[field] = {name: value / self._num_timed_steps[field] for name, value in sums.items()} or None
        return {
            # Of the whole job, averaged over time, not over intervals.
            "images_per_second": self._num_images / self._seconds if self._rates else None,
            "train_fps_min": min(self._rates, default=None),
            "train_fps_max": max(self._rates, default=None),
            **_percentiles(ordered, num_steps),
            "num_measured_steps": num_steps,
            "num_intervals": len(self._rates),
            "data_wait_share": self._data_seconds / self._seconds if self._rates else None,
            **means,
        }


def steadiness_warning(report: dict[str, Any]) -> str:
    """Return a warning if step times varied too much, else an empty string."""
    num_steps, median, slow = (report[name] for name in ("num_measured_steps", "step_seconds_p50", "step_seconds_p90"))
    if num_steps < MIN_MEASURED_STEPS or slow <= STEADY_RATIO * median:
        return ""
    return (
        f"step times are not steady: 10 % of the {num_steps} measured steps took {slow / median:.2f} x the median or "
        "longer; report the median, and check whether another program is using the machine"
    )


def _percentiles(ordered: Iterable[tuple[float, int]], num_values: int) -> dict[str, float | None]:
    """Nearest-rank percentiles, in one pass because there can be ten million values.

    Args:
        ordered: pairs of a value and its count, smallest value first.
        num_values: the sum of these counts.
    """
    found: dict[str, float | None] = {f"step_seconds_p{percent}": None for percent in PERCENTS}
    remaining, position = list(PERCENTS), 0
    for value, times in ordered:
        position += times
        while remaining and 100 * position >= num_values * remaining[0]:
            found[f"step_seconds_p{remaining.pop(0)}"] = value
    return found


def _hours_minutes_seconds(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
