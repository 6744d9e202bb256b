"""``report.json``: the final figures of a run, computed from its settings and events.

Safe to delete: ``python -m vgglab.report RUN`` writes it again.
"""

from __future__ import annotations

import sys
from typing import Any

from vgglab.errors import UserError
from vgglab.runs import Event, Run, _write_json

SEED_SETTINGS = (
    "model",
    "batch_size",
    "epochs",
    "training_step_per_epoch",
    "eval_step_per_epoch",
    "device",
    "skip_steps",
)


def build_report(run: Run) -> dict[str, Any]:
    """The seed kit's fields by its names, and what a reader needs to trust them.

    ``acc1`` and ``acc5`` are the best of all evaluations, in percent, each for itself, as in the seed kit.
    ``train_fps_*`` are images per second of the whole job, loading included; an interval between two log
    lines is one measurement, and those within the first ``skip_steps`` steps do not count. Where no
    interval is left the figures are null. ``training_time`` is h:mm:ss from the first event to the last,
    evaluation and checkpoints included.
    """
    config, env, events = run.config, run.env, run.events()
    if not config or not events:
        raise UserError(f"{run.path}: nothing to report yet")
    intervals = [event for event in events if event["event"] == "train" and not event["warmup"]]
    report = {name: config[name] for name in SEED_SETTINGS}
    report.update(
        local_rank=0,
        acc1=_best(events, "acc1"),
        acc5=_best(events, "acc5"),
        **_speed(intervals),
        training_time=_hours_minutes_seconds(events[-1]["seconds"]),
        status=run.status,
        world_size=env["world_size"],
        global_batch_size=config["batch_size"] * env["world_size"],
        seed=config["seed"],
        amp_dtype=env["amp_dtype"],
        hardware=env["hardware"],
        simulated=env["simulated"],
        versions=env["versions"],
        warnings=[event["text"] for event in events if event["event"] == "warning"],
    )
    return report


def _best(events: list[Event], figure: str) -> float | None:
    """The highest of all evaluations, those before a resume included (the start event carries them)."""
    seen = [event[figure] for event in events if event["event"] == "eval"]
    seen += [event["best"][figure] for event in events if event["event"] == "start" and event["best"]]
    return max(seen, default=None)


def _speed(intervals: list[Event]) -> dict[str, Any]:
    seconds = sum(event["interval_seconds"] for event in intervals)
    rates = [event["images_per_second"] for event in intervals]
    step_seconds = sorted(event["interval_seconds"] / event["interval_steps"] for event in intervals)
    images = sum(event["interval_images"] for event in intervals)
    return {
        "train_fps_mean": images / seconds if intervals else None,
        "train_fps_min": min(rates, default=None),
        "train_fps_max": max(rates, default=None),
        "step_seconds_p50": _percentile(step_seconds, 50),
        "step_seconds_p90": _percentile(step_seconds, 90),
        "step_seconds_p99": _percentile(step_seconds, 99),
        "data_wait_share": sum(event["data_seconds"] for event in intervals) / seconds if intervals else None,
        "num_intervals": len(intervals),
    }


def _percentile(ordered: list[float], percent: int) -> float | None:
    """Nearest rank: the smallest value that at least ``percent`` of all do not exceed."""
    if not ordered:
        return None
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _hours_minutes_seconds(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def main() -> int:
    """Write ``report.json`` anew for each run directory named on the command line."""
    if len(sys.argv) < 2:
        print("vgglab.report: error: name a run directory", file=sys.stderr)
        return 2
    try:
        for path in sys.argv[1:]:
            run = Run(path)
            _write_json(run.path / "report.json", run.report())
            print(run.path / "report.json")
    except UserError as error:
        print(f"vgglab.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
