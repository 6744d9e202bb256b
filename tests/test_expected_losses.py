"""The training losses match the recorded ones on any processor, and faults are detected."""

from importlib.metadata import version

import expected_losses
import pytest
from expected_losses import (
    BEFORE,
    FAULTS,
    NETWORKS,
    in_float64,
    measure,
    read_reference,
    tolerance_ratio,
    with_fault,
)
from processes import python

CAN_SIMULATE = tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 10)


@pytest.mark.parametrize("network", NETWORKS)
def test_float64_losses_match_the_recorded_ones(network):
    record, measured = read_reference()[network], in_float64(network, run=python)
    assert len(measured["losses"]) == 9
    assert tolerance_ratio(measured, record, "float64") <= 1
    assert measured["acc1"] == record["acc1"]


@pytest.mark.parametrize("device", ["cpu", "gcu-sim"])
def test_float32_losses_differ_only_by_rounding(device):
    if device == "gcu-sim" and not CAN_SIMULATE:
        pytest.skip("the simulated card needs torch 2.10")
    record, measured = read_reference()["vgg11"], measure("vgg11", device, run=python)
    assert 0 < tolerance_ratio(measured, record, "float32") <= 1
    assert measured["simulated"] is (device == "gcu-sim")


TRAINING_FAULTS = [fault for fault in FAULTS if fault != "evaluated in training mode"]


@pytest.mark.parametrize("fault", TRAINING_FAULTS)
def test_a_fault_in_training_is_detected_within_three_steps(fault):
    flags = ("--training-step-per-epoch=3", "--eval-step-per-epoch=1")
    measured, record = with_fault("vgg11", fault, *flags, run=python), read_reference()["vgg11"]
    pairs = zip(measured["losses"][:3], record["losses"], record["tolerances"]["float64"])
    assert max(abs(loss - expected) / expected / tolerance for loss, expected, tolerance in pairs) > 10


def test_a_fault_in_the_evaluation_changes_only_its_loss():
    result, record = with_fault("vgg11_bn", "evaluated in training mode", run=python), read_reference()["vgg11_bn"]
    assert tolerance_ratio({**result, "losses": [*result["losses"][:-1], record["losses"][-1]]}, record, "float64") <= 1
    assert tolerance_ratio(result, record, "float64") > 10


def test_each_fault_is_a_flag_or_a_code_change():
    assert all(fault.startswith("--") or fault in BEFORE for fault in FAULTS)


@pytest.mark.parametrize(("factor", "code"), [(1, 0), (1.1, 1)])
def test_the_script_exits_with_1_if_losses_differ(monkeypatch, capsys, factor, code):
    def scaled_losses(network, *_):
        return {"losses": [factor * loss for loss in read_reference()[network]["losses"]]}

    monkeypatch.setattr(expected_losses, "in_float64", scaled_losses)
    monkeypatch.setattr(expected_losses, "measure", scaled_losses)
    monkeypatch.setattr("sys.argv", ["expected_losses.py"])
    assert expected_losses.main() == code
    assert ("DIFFERS" in capsys.readouterr().out) is bool(code)
