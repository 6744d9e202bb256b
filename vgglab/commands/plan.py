"""``vgglab plan``: how long training will take and how much it will write to disk; see ``vgglab/lab/plan.py``."""

from __future__ import annotations

import json
from typing import Any, Sequence

from vgglab.commands import call
from vgglab.errors import UserError
from vgglab.runs.run import Run
from vgglab.settings.config import Request
from vgglab.settings.flags import AT_LEAST_1, POSITIVE, OneLineParser, number, with_dashes
from vgglab.settings.parser import flags_given, parse_flags
from vgglab.view.summaries import metric

SPEED = number(float, 1e-6, 1e12, "a number above 0")

parser = OneLineParser(
    prog="vgglab plan",
    usage="vgglab plan [--flag value ...]",
    description="Estimate how long a run takes and how much disk space it needs. Takes all flags of vgglab train.",
)
parser.add_argument("--images-per-second", type=SPEED, help="training speed of one card")
parser.add_argument("--run", help="take the speed from this run directory")
parser.add_argument("--ranks", type=AT_LEAST_1, help="number of cards (default: --nproc or --world-size)")
parser.add_argument(
    "--scaling",
    type=POSITIVE,
    default=1.0,
    help="scaling efficiency: total speed / (ranks x speed of one card) (default 1)",
)
parser.add_argument("--json", action="store_true", help="also print the result as one line of JSON")


def main(argv: Sequence[str]) -> int:
    options, flags = parser.parse_known_args([with_dashes(argument) for argument in argv])
    config = parse_flags(flags)
    ranks = options.ranks or max(config.world_size, config.nproc)
    speed = _speed(options)
    from vgglab.lab.plan import plan_training

    plan = plan_training(config, speed, ranks, options.scaling, flags_given(flags))
    if options.run is not None:
        plan.warnings.extend(_mismatch_warnings(config, Run(options.run)))
    print(plan)
    if options.json:
        print(json.dumps(plan._asdict()))
    return 0


def _speed(options: Any) -> float:
    """Return the images/s of one card. Raises UserError if both flags or neither are given, or the run has no speed."""
    if options.images_per_second is not None:
        if options.run is not None:
            raise UserError("--run and --images-per-second both give the speed; leave out one of them")
        return options.images_per_second
    if options.run is None:
        raise UserError("--images-per-second: give the training speed of one card, or take it from a run with --run")
    report = Run(options.run).report()
    if report["images_per_second"] is None:
        raise UserError(f"--run {options.run}: its speed was {metric(report, 'images_per_second')}")
    return report["images_per_second"] / report["world_size"]


def _mismatch_warnings(config: Request, run: Run) -> list[str]:
    """Return a list with a warning if the speed was measured with another network, image size or batch size; or []."""
    report, planned = run.report(), config.as_dict()
    planned["image_size"] = config.image_size or report["image_size"]
    names = [name for name in ("model", "image_size", "batch_size") if report[name] != planned[name]]
    differing = ", ".join(f"{name.replace('_', ' ')} {report[name]}" for name in names)
    return [f"--run {run.path.name}: its speed was measured with {differing}; the plan may be off"] if names else []


if __name__ == "__main__":
    raise SystemExit(call("plan"))
