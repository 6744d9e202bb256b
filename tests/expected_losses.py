"""The losses of a small fixed run, expected on any processor: a change in the numbers is seen.

python tests/expected_losses.py             # what is recorded, and whether this machine still gives it
python tests/expected_losses.py --faults    # what common mistakes would change, beside what rounding changes
python tests/expected_losses.py gcu         # record your card (--device gcu) in tests/expected/
python tests/expected_losses.py float64     # record the expected losses again, after a deliberate change

The losses are computed by the train command in float64, where processors differ by 1e-14 and a mistake shows as 1e-6
or more. In float32 no tolerance would serve: rounding moves the same losses as much as a doubled weight decay does.
A float32 run of the same weights is compared with the float64 losses by a tolerance that is derived from the run itself
(``measure_tolerances``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Sequence

FOLDER = Path(__file__).resolve().parent / "expected"
PROJECT = FOLDER.parent.parent
REFERENCE = FOLDER / "float64.json"
NETWORKS = ("vgg11", "vgg11_bn")  # without batch norm, evaluating in training mode would change nothing
NUM_STEPS = 8
# Whole numbers of classes, images and steps; no dropout, whose random numbers depend on the processor's make.
FLAGS = (
    "--data-path digits --epochs 1 --warmup 0 --batch-size 8 --lr 0.04 --workers 0 --fix-seed --print-freq 1 "
    f"--training-step-per-epoch {NUM_STEPS} --eval-step-per-epoch 4"
).split()
LONGEST_SUM = 512 * 3 * 3  # products in one output of the last convolutions
# By which relative error of each weight the rounding of one layer can be replaced. A sum of n products that is rounded
# n times with unit roundoff u is the exact sum for weights that are each off by about sqrt(n) u (Higham and Mary 2019,
# "A New Approach to Probabilistic Rounding Error Analysis"). The short types are added up in float32: rounded once.
WEIGHT_ERROR = {
    "float64": LONGEST_SUM**0.5 * 2.0**-53,
    "float32": LONGEST_SUM**0.5 * 2.0**-24,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
NUM_DRAWS = 4

# What the process runs before the train command, by name. The first is no mistake, the others are.
BEFORE = {
    "float64": """
import torch
from vgglab import trainer
build = trainer.build
def build_in_float64(*args, **options):
    network = build(*args, **options).double()  # the weights of the float32 run, to the bit
    torch.set_default_dtype(torch.float64)  # the type of all that is computed from here on
    return network
trainer.build = build_in_float64
""",
    "perturbed": """
build_exactly = trainer.build
def build_perturbed(*args, **options):
    network = build_exactly(*args, **options)
    draw = torch.Generator().manual_seed({seed})
    with torch.no_grad():
        for weight in network.parameters():
            signs = 2 * torch.randint(0, 2, weight.shape, generator=draw) - 1
            weight.mul_(1 + {size} * signs.to(weight.dtype))
    return network
trainer.build = build_perturbed
""",
    "mean and deviation of CIFAR-10": """
from vgglab.data import transform
transform.CHANNEL_MEAN, transform.CHANNEL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
""",
    "labels shifted by one": """
from vgglab.devices.native import NativeDevice
move = NativeDevice.move
NativeDevice.move = lambda self, images, labels: move(self, images, (labels + 1) % 10)
""",
    "evaluated in training mode": """
torch.nn.Module.eval = lambda self: self
""",
    "learning rate never set": """
trainer.set_learning_rate = lambda optimizer, rate: None
""",
}
# Each is a flag or a name of BEFORE.
FAULTS = (
    "--lr=0.044", "--momentum=0.85", "--weight-decay=2e-4", "--no-bias-weight-decay", "--dropout-rate=0.5",
    "--init=xavier", "--label-smoothing=0.01", *list(BEFORE)[2:],
)  # fmt: skip


def file_for(device: str) -> Path:
    return FOLDER / f"{device}.json"


def measure(network: str, device: str = "cpu", *changes: str, before: Sequence[str] = (), run: Callable | None = None):
    """Train here, and return ``losses``: of each step, then of the evaluation. What was used is there too.

    Args:
        changes: flags besides ``FLAGS``.
        before: lines of Python that the process runs first, such as those of ``BEFORE``.
        run: starts ``python`` with these words; by default a new interpreter.

    Raises:
        RuntimeError: the run failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        flags = [*FLAGS, f"--model={network}", *changes, f"--device={device}", f"--run-dir={run_dir}"]
        code = "\n".join([*before, "import sys; from vgglab.train import main; sys.exit(main(sys.argv[1:]))"])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
        result = (run or _new_interpreter)("-c", code, *flags, env=environment, cwd=folder)
        if result.returncode:
            raise RuntimeError(result.stderr.strip())
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        env = json.loads((run_dir / "env.json").read_text())
    return {
        **{name: env[name] for name in ("device", "hardware", "simulated", "versions", "amp_dtype", "tf32")},
        "losses": [event["loss"] for event in events if event["event"] in ("train", "eval")],
        "acc1": next(event["acc1"] for event in events if event["event"] == "eval"),
    }


def _new_interpreter(*words: str, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, **options)


def in_float64(network: str, *changes: str, before: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """``measure`` on the CPU, in float64."""
    return measure(network, "cpu", *changes, before=[BEFORE["float64"], *before], **options)


def deviations(losses: Sequence[float], expected: Sequence[float]) -> list[float]:
    """Relative, of each loss; infinite where their number differs."""
    if len(losses) != len(expected):
        return [float("inf")]
    return [abs(loss - wanted) / abs(wanted) for loss, wanted in zip(losses, expected)]


def measure_tolerances(network: str, expected: Sequence[float], precision: str) -> list[float]:
    """How far each loss may be from the float64 losses, relative, if ``precision`` is all that differs.

    The run is repeated in float64 with each weight off by ``WEIGHT_ERROR``, up or down at random: the largest deviation
    of a few such runs, twice, since each step is rounded again; and eight roundings at least, one for each image of the
    batch whose mean the loss is.
    """
    error = WEIGHT_ERROR[precision]
    draws = []
    for seed in range(NUM_DRAWS):
        before = BEFORE["perturbed"].format(seed=seed, size=error)
        draws.append(deviations(in_float64(network, before=[before])["losses"], expected))
    least = 8 * error / LONGEST_SUM**0.5
    return [max(least, *(2 * deviation for deviation in column)) for column in zip(*draws)]


def tolerance_ratio(found: dict[str, Any], record: dict[str, Any], precision: str) -> float:
    """The largest deviation of a loss in units of its tolerance: 1 or less where nothing but rounding differs."""
    pairs = zip(deviations(found["losses"], record["losses"]), record["tolerances"][precision])
    return max(deviation / tolerance for deviation, tolerance in pairs)


def precision_of(found: dict[str, Any]) -> str:
    return found["amp_dtype"] or ("tf32" if found["tf32"] else "float32")


def read_reference() -> dict[str, Any]:
    """By network: ``losses``, ``acc1`` and, by precision, ``tolerances``."""
    return json.loads(REFERENCE.read_text())["networks"]


def record_reference() -> dict[str, Any]:
    networks = {}
    for network in NETWORKS:
        found = in_float64(network)
        # With batch norm, float32's rounding grows to 1e-3 within the eight steps: such a run would show nothing.
        precisions = WEIGHT_ERROR if network == NETWORKS[0] else ["float64"]
        tolerances = {name: measure_tolerances(network, found["losses"], name) for name in precisions}
        networks[network] = {"losses": found["losses"], "acc1": found["acc1"], "tolerances": tolerances}
    return {"hardware": found["hardware"], "versions": found["versions"], "flags": FLAGS, "networks": networks}


def record_card(device: str) -> dict[str, Any]:
    return {**measure(NETWORKS[0], device), "network": NETWORKS[0], "flags": FLAGS}


def _compare_here() -> bool:
    """Print each comparison that can be made here; whether all agree."""
    reference, agree = read_reference(), True
    for network, record in reference.items():
        agree &= _print_comparison(f"{network} on cpu", in_float64(network), record, "float64")
        if "float32" in record["tolerances"]:
            agree &= _print_comparison(f"{network} on cpu", measure(network), record, "float32")
    for file in sorted(set(FOLDER.glob("*.json")) - {REFERENCE}):
        recorded = json.loads(file.read_text())
        record, precision = reference[recorded["network"]], precision_of(recorded)
        agree &= _print_comparison(f"{file.name}, as recorded", recorded, record, precision)
        try:
            found = measure(recorded["network"], recorded["device"])
        except RuntimeError as error:
            print(f"{file.name}: cannot be measured here ({error})")
        else:
            against = {**record, **recorded}
            agree &= _print_comparison(f"{file.name}, here, against its record", found, against, precision)
    return agree


def _print_comparison(name: str, found: dict[str, Any], record: dict[str, Any], precision: str) -> bool:
    share = tolerance_ratio(found, record, precision)
    deviation, allowed = max(deviations(found["losses"], record["losses"])), max(record["tolerances"][precision])
    verdict = "agrees" if share <= 1 else "DIFFERS"
    print(
        f"{name}, {precision}: {verdict}; largest relative deviation {deviation:.1e}, "
        f"largest tolerance {allowed:.1e}, largest deviation / its tolerance {share:.2g}"
    )
    return share <= 1


def with_fault(network: str, fault: str, *changes: str, **options: Any) -> dict[str, Any]:
    """In float64; ``fault`` is one of ``FAULTS``."""
    if fault in BEFORE:
        return in_float64(network, *changes, before=[BEFORE[fault]], **options)
    return in_float64(network, fault, *changes, **options)


def _show_faults() -> None:
    for network, record in read_reference().items():
        for fault in ("", *FAULTS):
            found = with_fault(network, fault) if fault else in_float64(network)
            deviation = max(deviations(found["losses"], record["losses"]))
            share = tolerance_ratio(found, record, "float64")
            print(f"{network:9s} {fault or 'as it is':32s} deviation {deviation:.1e}, {share:.1e} x its tolerance")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    from vgglab.devices import DEVICE_CHOICES

    choices = ("float64", *DEVICE_CHOICES)
    what = "record this device; float64: the expected losses themselves"
    parser.add_argument("device", nargs="?", choices=choices, help=what)
    parser.add_argument("--faults", action="store_true", help="show what common mistakes would change")
    options = parser.parse_args()
    print("each training of 8 steps takes some seconds, all together half a minute or more", file=sys.stderr)
    try:
        if options.faults:
            _show_faults()
        elif options.device:
            FOLDER.mkdir(exist_ok=True)
            content = record_reference() if options.device == "float64" else record_card(options.device)
            file = file_for(content.get("device", options.device))  # what auto or gpu came to
            file.write_text(json.dumps(content, indent=1) + "\n")
            print(file)
        elif not _compare_here():
            return 1
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
