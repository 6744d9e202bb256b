"""``report.json``: the final figures of a run, computed from its settings and events.

Safe to delete: ``python -m vgglab.report RUN`` writes it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vgglab.errors import UserError

if TYPE_CHECKING:
    from vgglab.runs.run import Event, Run

STEADY = 1.2  # a tenth of the steps slower than this many medians is worth a remark
FEWEST_STEPS_TO_JUDGE = 20


def read_report(run: Run) -> dict[str, Any]:
    """The same of files that anybody may have written. Raises UserError also where something is not in them."""
    try:
        return build_report(run)
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.path}: is damaged, or of another version ({error!r})") from error


def build_report(run: Run) -> dict[str, Any]:
    """The seed kit's fields by its names, and what a reader needs to trust them.

    ``acc1`` and ``acc5`` are the best of all evaluations, in percent, each for itself, as in the seed kit.
    ``train_fps_*`` are images per second of the whole job, loading included; an interval between two log
    lines is one measurement, and those within the first ``skip_steps`` steps do not count. Where no
    interval is left the figures are null, and so they are for a simulated card, whose speed is nobody's.
    ``training_time`` is h:mm:ss from the first event to the last, evaluation and checkpoints included.
    """
    config, env, events = run.config, run.env, run.events()
    if not events:
        raise UserError(f"{run.path}: nothing to report yet")
    if not config or not env:
        raise UserError(
            f"{run.path}: {'env.json' if config else 'config.json'} is missing; there is no report without it"
        )
    # In place a run may go on on other hardware: a simulated card's time, or that of fewer ranks, is not this speed.
    per_step = config["batch_size"] * env["world_size"]
    real = [] if env["simulated"] else [event for event in measured(events) if not event.get("simulated")]
    intervals = [event for event in real if event["interval_images"] == event["interval_steps"] * per_step]
    speed = _speed(intervals)
    return {
        "model": config.get("model"),
        "local_rank": 0,
        "batch_size": config["batch_size"],
        "epochs": config.get("epochs"),
        "training_step_per_epoch": config.get("training_step_per_epoch"),
        "eval_step_per_epoch": config.get("eval_step_per_epoch"),
        "acc1": _best(events, "acc1"),
        "acc5": _best(events, "acc5"),
        "device": config.get("device"),
        "skip_steps": config.get("skip_steps"),
        "train_fps_mean": speed["mean"],
        "train_fps_min": speed["min"],
        "train_fps_max": speed["max"],
        "training_time": _hours_minutes_seconds(events[-1]["seconds"]),
        # So far the seed kit's fields, in its order; from here on ours.
        "status": run.status,
        "damage": run.damage(),
        "num_lines": run.num_lines(),
        "recipe": config.get("recipe"),
        "world_size": env["world_size"],
        "data_path": config.get("data_path"),
        "data_is_fake": any(event.get("is_fake") for event in events if event["event"] == "start"),
        "num_skipped_images": len(run.skipped()),
        "decoder": config.get("decoder"),
        "image_size": config.get("image_size"),
        "lr": config.get("lr"),
        "global_batch_size": config["batch_size"] * env["world_size"],
        "images_per_second": speed["mean"],
        **_step_times(intervals),
        "seed": config.get("seed"),
        "amp_dtype": env.get("amp_dtype"),
        "tf32": env.get("tf32"),
        "channels_last": env.get("channels_last", False),
        "fused": env.get("fused", False),
        "compiled": env.get("compiled", False),
        "timers": config.get("timers", False),
        "first_step_seconds": None if env["simulated"] else _first_step(events),
        "peak_bytes": next((event.get("peak_bytes") for event in events if event["event"] == "end"), None),
        "hardware": env.get("hardware"),
        "simulated": env["simulated"],
        "versions": env.get("versions", {}),
        "warnings": list(dict.fromkeys(event["text"] for event in events if event["event"] == "warning")),
    }


def _first_step(events: list[Event]) -> float | None:
    """From the start of the process to the end of its first step."""
    return next((event["first_step_seconds"] for event in events if "first_step_seconds" in event), None)


def measured(events: list[Event]) -> list[Event]:
    """The training events whose speed counts: behind the skipped steps."""
    train = (event for event in events if event["event"] == "train" and event["is_measured"])
    return [event for event in train if event.keys() >= {"images_per_second", "data_seconds"}]


def _best(events: list[Event], figure: str) -> float | None:
    """The highest of all evaluations, those before a resume included (the start event carries them)."""
    seen = [event[figure] for event in events if event["event"] == "eval"]
    seen += [event["best"][figure] for event in events if event["event"] == "start" and event["best"]]
    return max(seen, default=None)


def _speed(intervals: list[Event]) -> dict[str, float | None]:
    """Images per second of the whole job; the mean is over time, not over intervals."""
    if not intervals:
        return {"mean": None, "min": None, "max": None}
    rates = [event["images_per_second"] for event in intervals]
    num_images = sum(event["interval_images"] for event in intervals)
    seconds = sum(event["interval_seconds"] for event in intervals)
    return {"mean": num_images / seconds, "min": min(rates), "max": max(rates)}


def _step_times(intervals: list[Event]) -> dict[str, Any]:
    """Of single steps where they were marked; a run of before that has the mean of each interval."""
    step_seconds: list[tuple[float, int]] = []  # and of how many steps
    for event in intervals:
        mean, steps = event["interval_seconds"] / event["interval_steps"], event["interval_steps"]
        step_seconds += [(one, 1) for one in event.get("step_seconds", ())] or [(mean, steps)]
    step_seconds.sort()
    seconds = sum(event["interval_seconds"] for event in intervals)
    return {
        "step_seconds_p50": _percentile(step_seconds, 50),
        "step_seconds_p90": _percentile(step_seconds, 90),
        "step_seconds_p99": _percentile(step_seconds, 99),
        "num_measured_steps": sum(number for _, number in step_seconds),
        "data_wait_share": sum(event["data_seconds"] for event in intervals) / seconds if intervals else None,
        "num_intervals": len(intervals),
        "phase_seconds": _a_step(intervals, "phase_seconds"),
        "host_reads": _a_step(intervals, "host_reads"),
    }


def _a_step(intervals: list[Event], figures: str) -> dict[str, float] | None:
    """The mean over all steps of what --timers have added up by name; None without them."""
    timed = [event for event in intervals if figures in event]
    num_steps = sum(event["interval_steps"] for event in timed)
    if not num_steps:
        return None
    names = dict.fromkeys(name for event in timed for name in event[figures])
    return {name: sum(event[figures].get(name, 0) for event in timed) / num_steps for name in names}


def remark_on_steadiness(intervals: list[Event]) -> str:
    """A line where the figures are not those of a machine at rest; else empty."""
    times = _step_times(intervals)
    num_steps, median, slow = (times[name] for name in ("num_measured_steps", "step_seconds_p50", "step_seconds_p90"))
    if num_steps < FEWEST_STEPS_TO_JUDGE or slow <= STEADY * median:
        return ""
    return (
        f"not steady: a tenth of the {num_steps} measured steps took {slow / median:.2f} x the median or longer; "
        "quote the median, and see whether something else is running"
    )


def _percentile(ordered: list[tuple[float, int]], percent: int) -> float | None:
    """Nearest rank: the smallest value that at least ``percent`` of all do not exceed; each with how often it comes."""
    left = -(-sum(number for _, number in ordered) * percent // 100)
    for value, number in ordered:
        left -= number
        if left <= 0:
            return value
    return None


def _hours_minutes_seconds(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
