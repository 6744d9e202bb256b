"""The expected losses of a short, fixed training run, to detect changes in the numbers on any processor.

python tests/expected_losses.py             # compare this machine and the recorded cards with the expected losses
python tests/expected_losses.py --faults    # how far common mistakes change the losses, in units of the tolerance
python tests/expected_losses.py gcu         # record your card (--device gcu) in tests/expected/
python tests/expected_losses.py float64     # record the expected losses again, after a deliberate change

The train command computes the losses in float64, where processors differ by 1e-14 and mistakes change the losses by
1e-6 or more. In float32, no single tolerance would work: rounding changes these losses as much as doubling the weight
decay does. So a float32 run with the same weights is compared with the float64 losses, with tolerances that are
measured by perturbing the run (``measure_tolerances``).
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
NETWORKS = ("vgg11", "vgg11_bn")  # evaluation in training mode is detected only with batch norm
NUM_STEPS = 8
# No dropout, because its random numbers depend on the processor's vendor.
FLAGS = (
    "--data-path digits --epochs 1 --warmup 0 --batch-size 8 --lr 0.04 --workers 0 --fix-seed --print-freq 1 "
    f"--training-step-per-epoch {NUM_STEPS} --eval-step-per-epoch 4"
).split()
LONGEST_SUM = 512 * 3 * 3  # products in one output of the last convolutions
# The relative error of each weight that has the same effect as the rounding in one layer. A sum of n products, rounded
# n times with unit roundoff u, is the exact sum for weights that each differ by about sqrt(n) u (Higham and Mary 2019,
# "A New Approach to Probabilistic Rounding Error Analysis"). The shorter types accumulate in float32: one rounding.
WEIGHT_ERROR = {
    "float64": LONGEST_SUM**0.5 * 2.0**-53,
    "float32": LONGEST_SUM**0.5 * 2.0**-24,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
NUM_PERTURBED_RUNS = 4

# Code that the process runs before the train command, by name. The first two are not faults, the others are.
BEFORE = {
    "float64": """
import torch
from vgglab import trainer
build = trainer.build
def build_in_float64(*args, **options):
    network = build(*args, **options).double()  # the weights of the float32 run, bit for bit
    torch.set_default_dtype(torch.float64)  # everything from here on is computed in float64
    return network
trainer.build = build_in_float64
""",
    "perturbed": """
build_unperturbed = trainer.build
def build_perturbed(*args, **options):
    network = build_unperturbed(*args, **options)
    generator = torch.Generator().manual_seed({seed})
    with torch.no_grad():
        for weight in network.parameters():
            signs = 2 * torch.randint(0, 2, weight.shape, generator=generator) - 1
            weight.mul_(1 + {size} * signs.to(weight.dtype))
    return network
trainer.build = build_perturbed
""",
    "mean and standard deviation of CIFAR-10": """
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
# Each is a flag or a name in BEFORE.
FAULTS = (
    "--lr=0.044", "--momentum=0.85", "--weight-decay=2e-4", "--no-bias-weight-decay", "--dropout-rate=0.5",
    "--init=xavier", "--label-smoothing=0.01", *list(BEFORE)[2:],
)  # fmt: skip


def file_for(device: str) -> Path:
    return FOLDER / f"{device}.json"


def measure(network: str, device: str = "cpu", *changes: str, before: Sequence[str] = (), run: Callable | None = None):
    """Train on this machine; returns the losses of all steps and of the evaluation, and the hardware and software used.

    Args:
        changes: flags in addition to ``FLAGS``.
        before: Python code that the process runs first, such as that in ``BEFORE``.
        run: a function that runs ``python`` with the given arguments; by default in a new interpreter.

    Raises:
        RuntimeError: the run failed; contains its error output.
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


def _new_interpreter(*args: str, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, **options)


def in_float64(network: str, *changes: str, before: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """``measure`` on the CPU, in float64."""
    return measure(network, "cpu", *changes, before=[BEFORE["float64"], *before], **options)


def deviations(losses: Sequence[float], expected: Sequence[float]) -> list[float]:
    """The relative deviation of each loss; infinite if the numbers of losses differ."""
    if len(losses) != len(expected):
        return [float("inf")]
    return [abs(loss - reference) / abs(reference) for loss, reference in zip(losses, expected)]


def measure_tolerances(network: str, expected: Sequence[float], precision: str) -> list[float]:
    """The relative deviation from the float64 losses that is allowed for each loss if only ``precision`` differs.

    The run is repeated in float64 with each weight changed by ``WEIGHT_ERROR``, up or down at random. The tolerance is
    twice the largest deviation of a few such runs, since each step is rounded again, but at least eight roundings, one
    for each image in the batch.
    """
    error = WEIGHT_ERROR[precision]
    runs = []
    for seed in range(NUM_PERTURBED_RUNS):
        before = BEFORE["perturbed"].format(seed=seed, size=error)
        runs.append(deviations(in_float64(network, before=[before])["losses"], expected))
    least = 8 * error / LONGEST_SUM**0.5
    return [max(least, *(2 * deviation for deviation in column)) for column in zip(*runs)]


def tolerance_ratio(measured: dict[str, Any], record: dict[str, Any], precision: str) -> float:
    """The largest ratio of a loss's deviation to its tolerance: 1 or less if only rounding differs."""
    pairs = zip(deviations(measured["losses"], record["losses"]), record["tolerances"][precision])
    return max(deviation / tolerance for deviation, tolerance in pairs)


def precision_of(measured: dict[str, Any]) -> str:
    return measured["amp_dtype"] or ("tf32" if measured["tf32"] else "float32")


def read_reference() -> dict[str, Any]:
    """``losses``, ``acc1`` and, by precision, ``tolerances`` of each network."""
    return json.loads(REFERENCE.read_text())["networks"]


def record_reference() -> dict[str, Any]:
    networks = {}
    for network in NETWORKS:
        measured = in_float64(network)
        # With batch norm, float32 rounding grows to 1e-3 within eight steps, too much to detect anything.
        precisions = WEIGHT_ERROR if network == NETWORKS[0] else ["float64"]
        tolerances = {name: measure_tolerances(network, measured["losses"], name) for name in precisions}
        networks[network] = {"losses": measured["losses"], "acc1": measured["acc1"], "tolerances": tolerances}
    return {"hardware": measured["hardware"], "versions": measured["versions"], "flags": FLAGS, "networks": networks}


def record_card(device: str) -> dict[str, Any]:
    return {**measure(NETWORKS[0], device), "network": NETWORKS[0], "flags": FLAGS}


def _compare_all() -> bool:
    """Print each comparison that is possible on this machine; returns whether all agree."""
    reference, all_agree = read_reference(), True
    for network, record in reference.items():
        all_agree &= _print_comparison(f"{network} on cpu", in_float64(network), record, "float64")
        if "float32" in record["tolerances"]:
            all_agree &= _print_comparison(f"{network} on cpu", measure(network), record, "float32")
    for file in sorted(set(FOLDER.glob("*.json")) - {REFERENCE}):
        recorded = json.loads(file.read_text())
        record, precision = reference[recorded["network"]], precision_of(recorded)
        all_agree &= _print_comparison(f"{file.name}, as recorded", recorded, record, precision)
        try:
            measured = measure(recorded["network"], recorded["device"])
        except RuntimeError as error:
            print(f"{file.name}: cannot be measured here ({error})")
        else:
            own_record = {**record, **recorded}
            all_agree &= _print_comparison(f"{file.name}, here, against its record", measured, own_record, precision)
    return all_agree


def _print_comparison(name: str, measured: dict[str, Any], record: dict[str, Any], precision: str) -> bool:
    ratio = tolerance_ratio(measured, record, precision)
    deviation, tolerance = max(deviations(measured["losses"], record["losses"])), max(record["tolerances"][precision])
    verdict = "agrees" if ratio <= 1 else "DIFFERS"
    print(
        f"{name}, {precision}: {verdict}; largest relative deviation {deviation:.1e}, "
        f"largest tolerance {tolerance:.1e}, largest deviation / its tolerance {ratio:.2g}"
    )
    return ratio <= 1


def with_fault(network: str, fault: str, *changes: str, **options: Any) -> dict[str, Any]:
    """``in_float64`` with one of ``FAULTS``."""
    if fault in BEFORE:
        return in_float64(network, *changes, before=[BEFORE[fault]], **options)
    return in_float64(network, fault, *changes, **options)


def _show_faults() -> None:
    for network, record in read_reference().items():
        for fault in ("", *FAULTS):
            measured = with_fault(network, fault) if fault else in_float64(network)
            deviation = max(deviations(measured["losses"], record["losses"]))
            ratio = tolerance_ratio(measured, record, "float64")
            print(f"{network:9s} {fault or 'as it is':32s} deviation {deviation:.1e}, {ratio:.1e} x its tolerance")


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
            file = file_for(content.get("device", options.device))  # the device that auto or gpu stands for
            file.write_text(json.dumps(content, indent=1) + "\n")
            print(file)
        elif not _compare_all():
            return 1
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
