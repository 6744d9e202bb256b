"""The first 20 losses and the accuracy of a small fixed run, per device: a change in the numbers is seen.

python tests/expected_losses.py            # what there is, and whether this machine still gives it
python tests/expected_losses.py gcu        # adds a file for your card (--device gcu) to tests/expected/
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "expected"
PROJECT = FOLDER.parent.parent
NUM_LOSSES = 20
# No dropout, no batch norm, a small rate: rounding has no time to grow, so that torch 1.10 and today's give the same.
FLAGS = (
    "--data-path digits --model vgg11 --epochs 1 --warmup 0 --batch-size 32 --lr 0.01 --workers 0 --fix-seed "
    f"--print-freq 1 --training-step-per-epoch {NUM_LOSSES} --eval-step-per-epoch 4"
).split()
MOST_HITS_OFF = 1
RELATIVE_TOLERANCE = 3e-4  # between processors and their kernels; a wrong step is off by far more


def file_for(device: str) -> Path:
    return FOLDER / f"{device}.json"


def measure(device: str, *changes: str) -> dict:
    """Run it here. Raises RuntimeError with what the run printed if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, "-m", "vgglab.train", *FLAGS, *changes, f"--device={device}", f"--run-dir={run_dir}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr.strip())
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        env = json.loads((run_dir / "env.json").read_text())
    return {
        "device": device,
        "hardware": env["hardware"],
        "simulated": env["simulated"],
        "versions": env["versions"],
        "flags": FLAGS,
        "losses": [event["loss"] for event in events if event["event"] == "train"],
        **{name: value for event in events if event["event"] == "eval" for name, value in _accuracy(event).items()},
    }


def _accuracy(event: dict) -> dict:
    return {"acc1": event["acc1"], "num_eval_images": event["num_images"]}


def hits_off(found: dict, expected: dict) -> float:
    """By how many held-out images the accuracy differs; one may fall either way by rounding."""
    return abs(found["acc1"] - expected["acc1"]) / 100 * expected["num_eval_images"]


def largest_deviation(losses: list[float], expected: list[float]) -> float:
    """Relative, over all steps; infinite where their number differs."""
    if len(losses) != len(expected):
        return float("inf")
    return max(abs(loss - wanted) / abs(wanted) for loss, wanted in zip(losses, expected))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", help="measure it and write its file")
    device = parser.parse_args().device
    try:
        if device:
            FOLDER.mkdir(exist_ok=True)
            file_for(device).write_text(json.dumps(measure(device), indent=1) + "\n")
            print(file_for(device))
            return 0
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for file in sorted(FOLDER.glob("*.json")):
        expected = json.loads(file.read_text())
        try:
            found = measure(expected["device"])
            deviation = largest_deviation(found["losses"], expected["losses"])
        except RuntimeError as error:
            print(f"{file.name}: not to be had here ({error})")
        else:
            off = round(hits_off(found, expected))
            print(
                f"{file.name}: largest relative deviation {deviation:.1e} (allowed {RELATIVE_TOLERANCE:.0e}), "
                f"{off} of {expected['num_eval_images']} held-out images otherwise (allowed {MOST_HITS_OFF})"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
